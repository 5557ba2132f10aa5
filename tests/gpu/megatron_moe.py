#!/usr/bin/env python3
"""Train a small mixture-of-experts GPT with unmodified Megatron-core (PyPI), expert parallel over all ranks, alltoall dispatcher.

Started as one rank of many with torchrun's environment (tests/gpu/cluster; tests/gpu/frameworks drives it with and without Railyard).
Needs megatron-core 0.13 or later and nothing else beside PyTorch and NumPy (tests/gpu/wheels): without Transformer Engine and apex
Megatron takes its local layers, whose norms demand that attention is not tensor-parallel, and PyTorch's AdamW.

Per layer and step it exchanges tokens to experts (equal rows: a token's for each of its experts), probabilities, and results back; and in
the backward pass the mirror of each, where the gradients of the results are the equal rows.
"""
import moe_job  # before torch: what must be set first

import torch
import torch.distributed as dist

import megatron.core
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

# Without Transformer Engine, Megatron-core 0.13 to 0.16 (at least) asks whether this is None but never sets it.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def main():
    p = moe_job.options(__doc__.splitlines()[0])
    p.add_argument("--heads", type=int, default=0, help="default: one for each 64 of hidden")
    p.add_argument("--capacity", type=float, default=0, help="drop tokens beyond this factor and pad to it: equal splits (0: dropless)")
    p.add_argument("--balance", type=float, default=0, help="coefficient of a balance loss over all ranks' tokens (0: none)")
    a = p.parse_args()
    rank, world, device = moe_job.begin(a)
    if a.cpu:
        moe_job.on_cpu()
    # No device_id: bound to a device, each of the dozens of groups that Megatron makes would build its communicator at once, used or not.
    dist.init_process_group("gloo" if a.cpu else "nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world, create_gloo_process_groups=False)
    ended = moe_job.over_nccl(a, parallel_state.get_expert_model_parallel_group())
    if not a.cpu:
        model_parallel_cuda_manual_seed(a.seed)
    dtype = torch.float32 if a.fp32 else torch.bfloat16
    config = TransformerConfig(
        num_layers=a.layers, hidden_size=a.hidden, num_attention_heads=a.heads or max(1, a.hidden // 64), ffn_hidden_size=a.ffn,
        num_moe_experts=a.experts, moe_router_topk=a.top_k, moe_ffn_hidden_size=a.ffn, moe_router_pre_softmax=a.top_k == 1,
        expert_model_parallel_size=world, moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="global_aux_loss" if a.balance else "none", moe_aux_loss_coeff=a.balance,
        moe_router_dtype="fp32", moe_expert_capacity_factor=a.capacity or None, moe_pad_expert_input_to_capacity=bool(a.capacity),
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bf16=not a.fp32, params_dtype=dtype,
        pipeline_dtype=dtype, use_cpu_initialization=a.cpu, deterministic_mode=True, masked_softmax_fusion=False, persist_layer_norm=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False)
    model = GPTModel(config, get_gpt_layer_local_spec(num_experts=a.experts, moe_grouped_gemm=False), vocab_size=moe_job.vocabulary(a),
                     max_sequence_length=a.seq, position_embedding_type="rope").to(device)
    if not a.fp32:
        model = Float16Module(config, model)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.broadcast_params()
    moe_job.load(a, rank, model.module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=a.lr, adam_beta2=0.95, bf16=not a.fp32, params_dtype=dtype, clip_grad=0.0 if a.gradients else 1.0), [model],
        use_gloo_process_groups=False)

    def step(tokens, labels, place):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, place, None, labels=labels).mean()  # no mask given: causal
        loss.backward()
        finalize_model_grads([model])
        done = optimizer.step()[0]
        if not done:
            raise SystemExit("megatron_moe: rank %d: the optimizer left a step out" % rank)
        return loss

    if rank == 0:
        print("megatron_moe: Megatron-core %s, %d experts over %d ranks" % (megatron.core.__version__, a.experts, world), flush=True)
    def gradients():
        return {name: q.main_grad for name, q in model.module.named_parameters()}

    moe_job.train("megatron_moe", a, rank, world, device, step, model.parameters(), optimizer.param_groups, gradients)
    moe_job.save(a, rank, model.module)
    ended()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
