"""What other tools call our options: nanoGPT, the Trainer of transformers, litgpt, Lightning, llm.c."""

from __future__ import annotations

_TABLE = """\
--optim.lr                      learning-rate lr max-lr base-lr peak-lr eta
--optim.embedding-lr            embed-lr embedding-learning-rate
--optim.weight-decay            wd decay weight-decay l2
--optim.betas                   beta beta1 beta2 adam-beta1 adam-beta2 adam-betas
--optim.eps                     epsilon adam-epsilon adam-eps
--optim.max-norm                grad-clip gradient-clip gradient-clip-val max-grad-norm clip
                                clip-norm
--optim.name                    optimizer optimizer-name opt
--schedule.name                 schedule lr-schedule scheduler lr-scheduler lr-scheduler-type
                                lr-decay
--schedule.warmup-steps         warmup warmup-iters num-warmup-steps lr-warmup-steps
--schedule.min-lr               min-lr lr-min final-lr eta-min min-learning-rate
--schedule.decay-steps          lr-decay-iters lr-decay-steps cooldown cooldown-steps
--training.steps                steps max-steps max-iters iters iterations num-iterations num-steps
                                train-steps num-train-steps total-steps
--training.batch-size           batch train-batch-size global-batch-size total-batch-size batchsize
                                bs
--training.micro-batch-size     micro-batch device-batch-size per-device-train-batch-size
                                gradient-accumulation-steps accumulate-grad-batches grad-accum
                                accumulation-steps
--training.precision            dtype fp16 bf16 amp mixed-precision autocast
--training.compile              torch-compile compile-model
--training.device               cuda cpu gpu accelerator no-cuda use-cpu
--training.seed                 random-seed rng-seed manual-seed
--training.eval-every           eval-interval eval-steps val-every val-loss-every val-check-interval
--training.eval-batches         eval-iters val-batches limit-val-batches eval-max-batches
--training.checkpoint-every     save-interval save-steps save-every checkpoint-interval
--training.keep                 save-total-limit keep-checkpoints max-checkpoints
--training.sample-every         generate-every sample-interval
--training.sample-tokens        sample-len sample-length
--training.watch-every          log-interval log-every logging-steps log-every-n-steps
--training.parallel             ddp fsdp strategy distributed
--model.context-length          block-size seq-len seq-length sequence-length max-seq-len
                                max-seq-length max-length ctx n-ctx context context-size
--model.num-layers              n-layer n-layers layers num-hidden-layers depth layer
--model.num-heads               n-head n-heads heads num-attention-heads head
--model.d-model                 n-embd dim hidden-size hidden-dim embed-dim embedding-dim width
--model.d-ff                    ffn-dim intermediate-size mlp-dim d-mlp dim-feedforward
--model.rope-theta              rope-base theta
--data.corpus                   data dataset dataset-name data-path data-dir train-data train-file
                                input text file input-bin
--data.tokenizer                tokenizer-name tokenizer-path vocab
--data.vocab-size               vocabulary-size n-vocab
--data.validation-fraction      val-split test-size validation-split val-fraction
--run                           out-dir output-dir save-dir out output log-dir logdir exp-name
--resume                        resume-from-checkpoint resume-from init-from continue ckpt-path load
--tokens                        max-new-tokens max-tokens num-tokens n-predict new-tokens
--prompt                        start input-text prefix
--checkpoint                    ckpt step
--temperature                   temp
--port                          p
--to                            out output output-dir out-dir dest
"""

OTHER_NAMES: dict[str, list[str]] = {}
"""Our option → what others call it."""
for _line in _TABLE.splitlines():
    _option, _names = _line[:30].strip(), _line[30:].split()
    OTHER_NAMES.setdefault(_option or next(reversed(OTHER_NAMES), ""), []).extend(_names)


def option_for(given: str, known: set[str]) -> str | None:
    """Returns the option of `known` that another tool or another section calls `given`, or None.

    "--optim.learning-rate", "--learning_rate" and "-lr" all mean "--optim.lr".
    """
    plain = given.lstrip("-").replace("_", "-").lower()
    section, _, last = plain.rpartition(".")
    meant = [option for option, others in OTHER_NAMES.items() if last in others and option in known]
    meant += [option for option in sorted(known) if option.rpartition(".")[2].lstrip("-") == last]
    same = [option for option in meant if section and option.startswith(f"--{section}.")]
    return next(iter(same or meant), None)
