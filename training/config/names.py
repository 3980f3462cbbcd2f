"""What to say of a setting that does not exist: its name in flash-gpt, where we know what the person meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from omegaconf import DictConfig, OmegaConf

# Our names for what other trainers (nanoGPT, nanochat, litgpt, torchtitan, Hugging Face's) call otherwise.
OTHER_NAMES: dict[str, str] = {
    theirs: ours
    for ours, names in {
        "seq_len": "block_size context_length context_len context_size max_length max_len max_seq_len max_seq_length "
        "max_sequence_length sequence_length seq_length seqlen n_ctx ctx_len max_position_embeddings",
        "batch_size": "batch micro_batch micro_batch_size microbatch_size mbs local_batch_size device_batch_size "
        "train_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu",
        "tokens_per_step": "global_batch_size total_batch_size effective_batch_size batch_tokens "
        "gradient_accumulation gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches "
        "accumulation_steps accumulation",
        "max_steps": "steps num_steps n_steps total_steps train_steps training_steps num_train_steps max_train_steps "
        "iters max_iters num_iters iterations num_iterations train_iters",
        "max_tokens": "tokens num_tokens total_tokens train_tokens token_budget",
        "learning_rate": "lr max_lr peak_lr base_lr init_lr learnrate",
        "grad_clip": "clip clip_grad clip_grad_norm max_grad_norm max_norm gradient_clipping gradient_clip_val",
        "z_loss": "z_loss_weight z_loss_coefficient z_loss_multiplier aux_z_loss zloss",
        "label_smoothing": "smoothing label_smoothing_factor",
        "seed": "random_seed rng_seed manual_seed",
        "device": "gpu cuda accelerator",
        "precision": "dtype torch_dtype bf16 fp16 fp32 tf32 amp mixed_precision autocast",
        "compile": "torch_compile use_compile",
        "cuda_graphs": "cudagraphs cuda_graph use_cuda_graph enable_cuda_graph",
        "log_every": "log_interval logging_steps log_freq log_every_n_steps print_every",
        "profile": "profiler profiling enable_profiling use_profiler torch_profiler profile_memory memory_snapshot "
        "enable_memory_snapshot",
        "profile_steps": "profile_freq profiler_steps profile_step profile_step_start profile_step_end",
        "eval_every": "eval_interval eval_steps eval_freq val_every val_interval val_check_interval validate_every",
        "eval_tokens": "eval_iters eval_batches val_tokens limit_val_batches",
        "sample_every": "sample_interval generate_every",
        "sample_tokens": "max_new_tokens",
        "sample_prompt": "prompt",
        "checkpoint.save": "save_model save_checkpoint save_checkpoints save_final",
        "checkpoint.every": "save_every save_interval save_steps checkpoint_interval ckpt_every checkpoint_every",
        "checkpoint.keep_last": "save_total_limit keep_last_k max_checkpoints",
        "run_dir": "out_dir output_dir out save_dir log_dir checkpoint_dir ckpt_dir workdir dump_folder run_name",
        "resume": "resume_from resume_from_checkpoint load_checkpoint ckpt ckpt_path checkpoint_path",
        "init_from": "pretrained pretrained_path from_pretrained load_from weights finetune_from",
        "max_time": "time_limit max_minutes timeout",
        "attention": "attn attn_implementation attention_backend attention_impl flash flash_attn flash_attention "
        "use_flash use_flash_attn use_flash_attention sdp_backend",
        "memory": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing activation_checkpoint "
        "activations_checkpoint_method checkpoint_activations recompute_activations recompute_granularity",
        "parallel": "strategy distributed_strategy dp ddp fsdp use_fsdp sharding sharding_strategy parallelism",
        "parallel.context": "cp cp_size context_parallel context_parallel_size context_parallel_degree "
        "sequence_parallel sequence_parallel_size",
        "model.dim": "hidden_size hidden_dim hidden n_embd n_embed d_model embed_dim embedding_dim model_dim emb_dim",
        "model.n_layers": "n_layer num_layers num_hidden_layers layers depth n_blocks",
        "model.n_heads": "n_head num_heads num_attention_heads heads",
        "model.n_kv_heads": "n_kv_head num_kv_heads num_key_value_heads n_query_groups num_query_groups kv_heads",
        "model.head_dim": "d_head head_size kv_channels",
        "model.ffn_dim": "intermediate_size ffn_hidden_size d_ff ff_dim mlp_dim n_inner hidden_mult",
        "model.vocab_size": "padded_vocab_size n_vocab vocab",
        "model.window": "sliding_window window_size attention_window",
        "model.rotary.theta": "rope_theta rope_base rotary_base",
        "model.tie_head": "tie_word_embeddings tie_embeddings weight_tying tie_weights",
        "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
        "model.attention_softcap": "attn_logit_softcapping attn_softcap",
        "model.logit_softcap": "final_logit_softcapping logits_soft_cap",
        "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
        "optimizer.eps": "adam_epsilon adam_eps",
        "precision.residual": "residual_dtype",
        "precision.moments": "moment_dtype exp_avg_dtype optim_dtype optimizer_dtype",
        "precision.reduction": "reduce_dtype grad_reduce_dtype",
        "optimizer": "optim optimizer_type",
        "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style",
        "schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps warmup_ratio",
        "schedule.min_ratio": "min_lr min_lr_ratio final_lr_frac",
        "data": "dataset dataset_name corpus train_data",
        "data.path": "data_path data_dir dataset_path train_file train_files input_file",
        "tokenizer": "tokenizer_name tokenizer_type",
        "tokenizer.path": "tokenizer_path tokenizer_file",
        "logger": "report_to log_with use_wandb wandb tensorboard trackers",
        "logger.wandb.project": "wandb_project project project_name",
    }.items()
    for theirs in names.split()
}
# Settings of other trainers that we have no counterpart of: what to do instead.
ABSENT = {
    **dict.fromkeys(
        ("epochs", "epoch", "num_epochs", "n_epochs", "num_train_epochs", "max_epochs"),
        "use max_steps or max_tokens (the start-up lines say how many epochs they make)",
    ),
    **dict.fromkeys(
        ("num_gpus", "n_gpus", "n_gpu", "gpus", "devices", "nproc_per_node", "world_size", "num_nodes", "nodes"),
        "the launcher says how many: torchrun --nproc-per-node=8 train.py … (docs/parallel.md)",
    ),
    **dict.fromkeys(
        ("dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"),
        "no model has dropout: leave it out",
    ),
    **dict.fromkeys(
        ("num_workers", "dataloader_num_workers", "pin_memory"),
        "rows are read from prepared token files without workers: leave it out",
    ),
}


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a nested configuration: seq_len, model, model.dim, …"""
    for key in map(str, config):
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(config._get_node(key)) and not OmegaConf.is_missing(config, key):
            yield from dotted_keys(config[key], f"{prefix}{key}.")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The line for a key that does not exist, with the setting that was meant."""
    known = list(known)
    last = key.rpartition(".")[2]
    named = [name for name in known if name.rpartition(".")[2] == last]  # dim=64 for model.dim=64
    if not named and last in ABSENT:
        return f"{key} is not a setting; {ABSENT[last]}"
    if not named and OTHER_NAMES.get(last) in known:
        named = [OTHER_NAMES[last]]
    if not named:  # initials: wd for optimizer.weight_decay
        named = [name for name in known if "".join(w[:1] for w in name.rpartition(".")[2].split("_")) == last]
    near = named or get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "python train.py --cfg job shows every setting"
    return f"{key} is not a setting; {hint}"
