"""Railyard's adapter: what a Python framework must be asked, and nothing that C can do.

Started by sitecustomize.py beside this package, not imported by a user (but for locmoe.py). docs/live-placement.md is the picture; the parts:

  hook.py       waits for modules to be imported, then patches them                     (standard library only, like all but those marked)
  say.py        lines on stderr, "railyard: rank 3: …", by RAILYARD_LOG
  library.py    librailyard-engine.so through ctypes: live placement, settings
  board.py      the keys and values that all ranks share                                (torch)
  job.py        this rank's part in the job: hello, off, the leader's check of all
  dealing.py    whole lists: what the job's sampler deals to all ranks
  batch.py      DataLoader and samplers: windows, obeying the board                     (torch)
  planner.py    the leader's windows: asks the library, claims, says what came of it
  tokens.py     samples' tokens, read ahead                                             (torch)
  observe.py    observations: made without a synchronization, sent, added up            (torch, NumPy)
  layers.py, deciding.py    samples moved between layers: agreement and answers; who goes where            (torch)
  moving.py, combining.py   the moves themselves, between layers and inside combine                        (torch)
  adapt.py      what the adapters of frameworks share: findings, wrapping, joining
  experts.py    experts moved between ranks at start: agreement, exchange, notes        (torch)
  expert_tensors.py     what belongs to an expert, and where optimizers keep it         (torch)
  megatron_experts.py, deepspeed_experts.py  where the frameworks keep what is moved    (megatron, deepspeed)
  megatron_layers.py    where Megatron's layers let samples move, and which options forbid it  (megatron)
  megatron.py   Megatron-core: what to wrap, what to refuse, who holds what             (megatron)
  deepspeed.py  DeepSpeed: the same                                                     (deepspeed)

And one that a user may import, of which the rest knows nothing:

  locmoe.py     LocMoE's router and losses as modules                                   (torch)
"""

VERSION = 1  # of what ranks tell each other; ranks of one job must agree
