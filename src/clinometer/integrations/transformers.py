"""A callback for transformers' Trainer, and for the trainers made of it (TRL's, for one).

Trainer(model, args, train_dataset=data, callbacks=[ClinometerCallback("runs/mine")]).train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clinometer.integrations.optional_packages import need
from clinometer.integrations.trainer_watch import Watching
from clinometer.messages import InputError

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerCallback
else:
    TrainerCallback = need("transformers.trainer_callback", "transformers").TrainerCallback


class ClinometerCallback(Watching, TrainerCallback):
    """Records every tensor at every step of a Trainer: what two lines with `clinometer.watch` record.

    The watch begins when the model is on its device and wrapped, and a step is one of the optimizer's,
    however many batches were accumulated for it. Evaluations and checkpoints are marked, and so are each
    step's tokens where the Trainer counts them (`include_num_input_tokens_seen`).
    `trainer.train(resume_from_checkpoint=…)` continues in the same folder. No number of the training changes.

    Raises InputError when training begins: a folder that holds another run or cannot be written; DeepSpeed,
    whose engine takes the steps.
    """

    _tokens = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise InputError("integrations.deepspeed")
        self._tokens = state.num_input_tokens_seen
        self.begin(model, optimizer, state.global_step, args.to_sanitized_dict())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen, self._tokens = self._tokens, state.num_input_tokens_seen
        if self.watch is not None and self._tokens > seen:
            self.watch.log(tokens=self._tokens - seen)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        losses = [value for name, value in (metrics or {}).items() if name.endswith("_loss")]
        self.validated(losses[0] if losses else None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.event("checkpoint", path=f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end()
