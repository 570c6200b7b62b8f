"""What Clinometer uses of torch beyond its public interface: looked up once, in this module alone.

A test (tests/test_torch_internals.py) forbids such names elsewhere. `MISSING` names the details that this
torch does not have; `torch_support.offers` says in one sentence what that means, and everything else works.
Seen to work with torch 2.10.0, 2.13.0, 2.14.1 and 2.15.0 unless a line says otherwise.

    detail                                            used for                             without it
    BackwardCFunction.apply, apply_jvp, apply_boxed   whether a custom Function runs       depth is 0 there
      (apply_boxed: from 2.13; Function.apply is a Python function up to 2.13 and built in from 2.14)
    CheckpointFunction.forward                        looking into reentrant checkpoints   "checkpoints"
    _C.DisableTorchFunction                           the same                             "checkpoints"
    _C._are_functorch_transforms_active               leaving vmap and grad alone          "transforms"
    _C._functorch.get_unwrapped, is_functorch_wrapped_tensor, is_gradtrackingtensor
                                                      the graph and the values in them     "transforms"
    _functorch.eager_transforms._wrap_tensor_for_grad                                      low precision there
    _unpack_dual, a call's name                       derivatives of forward mode          taken as a cut
    _C._autograd._top_saved_tensors_default_hooks     reading what nodes saved             "saved"
    node._saved_<name>                                the same                             None
    node._input_metadata, _sequence_nr                shapes and order of nodes            None
    node type's _forward_cls                          the class of a custom Function       "functions"
    autograd.graph._engine_run_backward               backward under a mode                "engine"
    autograd.grad_mode._unsafe_preserve_version_counter   putting versions back            "versions"
    Tensor._version, _base, _indices, _values         writes in place, views, sparse parts in all versions
    Tensor._backward_hooks, _post_accumulate_grad_hooks   hooks of the user                no hook seen
    Tensor._ragged_idx                                jagged tensors                       dimension 1
    UntypedStorage._cdata                             which memory                         its address
    utils._python_dispatch.is_traceable_wrapper_subclass  DTensor, torchao, jagged         __tensor_flatten__
    OpOverload._schema                                names of an operator's arguments     no names
    torch._library.autograd, its closure              backward of a custom operator        "operators"
    Module._modules, _parameters, _forward_hooks, _forward_pre_hooks                       in all versions
    nn.modules.module._has_any_global_hook            decoding without modules             with modules
    Module._compiled_call_impl, _orig_mod and other wrappers' names                        name stays
    nn.modules.batchnorm._BatchNorm, _NormBase, dropout._DropoutNd                         their subclasses
    fsdp: _get_fsdp_state, _fsdp_param_groups (from 2.12; before: _fsdp_param_group),
      _to_sharded, _unsharded_param                   sharded parameters                   "fsdp"
    distributed_c10d._get_default_store               ranks that watch together            "store"
    _foreach_add_, _copy_, _mul_, _norm, _sub_        many small tensors at once           one by one
    _fused_adamw_, _fused_sgd_                        fused optimizer steps                the reference
    _utils._flatten_dense_tensors, _unflatten_…       the same                             cat and split
    optim.Muon._init_group                            Muon in batches                      torch's own step
    GradScaler._scale                                 the loss scale without waiting       "scaler"
    clip_grad._clip_grads_with_norm_                  hearing of clipping                  the public names
    ops.mkldnn._linear_pointwise, _reorder_linear_weight, _is_mkldnn_bf16_supported        plain products
    cpu._is_amx_tile_supported, _is_avx512_bf16_supported                                  float32
    "torch._dynamo" among the loaded modules          leaving the compiler out             taken as not loaded
    _dynamo.eval_frame._callback_from_stance          whether compiled code ran            modules only
    frames: of decorators (decorate_context up to 2.14, another name from 2.15, one file), of grad_scaler.py
      and nn/utils/parametrizations.py                                                     a line less exact
    frames: that only overrides.py and utils/_python_dispatch.py put modes away        Ctrl-C may leave a mode
"""
