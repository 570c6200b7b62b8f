"""A callback for Lightning's Trainer, whichever of its two packages is in use.

Trainer(max_epochs=3, callbacks=[ClinometerCallback("runs/mine")]).fit(model, loader)
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from clinometer.integrations.optional_packages import MissingPackage, need
from clinometer.integrations.trainer_watch import Watching


def _callback() -> Any:
    """`Callback` of `lightning` or of `pytorch_lightning`: the one that the program has imported, if any."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: sys.modules.get(name) is None)
    try:
        return need(names[0], "lightning").Callback
    except MissingPackage as error:
        try:
            return need(names[1], "lightning").Callback
        except MissingPackage:
            raise error from None


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _callback()


class ClinometerCallback(Watching, Callback):
    """Records every tensor at every step of a Trainer: what two lines with `clinometer.watch` record.

    The watch begins when model and optimizers are on their device and restored, and covers all optimizers
    of the module, in automatic and in manual optimization. A step is one of the optimizer's, however many
    batches were accumulated for it; of several optimizers, a round in which none steps twice. Validations
    are marked if the module logs `validation_loss` ("val_loss"). `fit(ckpt_path=…)` continues in the same
    folder. No number of the training changes.

    Raises InputError when training begins: a folder that holds another run or cannot be written.
    """

    def __init__(self, *arguments: Any, validation_loss: str = "val_loss", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._validation_loss = validation_loss
        self._restored: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        step, self._restored = self._restored, None
        if step is None:  # it was not watched before; Lightning counts every optimizer's steps
            step = trainer.global_step // max(1, len(trainer.optimizers))
        config = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        config |= {"accumulate_grad_batches": trainer.accumulate_grad_batches, "precision": trainer.precision}
        config |= {"gradient_clip_val": trainer.gradient_clip_val, "hyperparameters": dict(pl_module.hparams)}
        self.begin(pl_module, trainer.optimizers, step, config)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated(trainer.callback_metrics.get(self._validation_loss))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if self.watch is not None:
            self.watch.event("checkpoint", path=f"epoch={trainer.current_epoch}, step={trainer.global_step}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end("stopped" if isinstance(exception, KeyboardInterrupt) else "failed")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """The number of the last step, so that a resumed run counts on."""
        return {} if self.watch is None else {"step": self.watch.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("step")
