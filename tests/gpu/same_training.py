"""That training with placement is the same training: curves of losses, gradients of one step.

Owns: the jobs that show it, the statistics, the picture. Not: weights and plans (placement_jobs.py), the cluster.
"""


def options(p):
    p.add_argument("--curve", type=int, nargs="?", const=300, default=0, metavar="STEPS")
    p.add_argument("--gradients", action="store_true")


def show(a, folder, end):
    raise NotImplementedError
