"""
train.py on a Ray cluster: Ray starts one process per GPU anywhere in the cluster, connects them, and starts again after
a failure; the training is the same file as everywhere.

Run     pip install 'ray[train]==2.60.0'
        python runs/ray_train.py --workers=8 --gpu -- --preset=gpt2 --dataset=NAME --out=/shared/gpt2 --parallel=fsdp
        python runs/ray_train.py --workers=2 -- --dataset=shakespeare --max_steps=20 --out=out/ray     # on a laptop
Needs   this folder at the same place on every machine of the cluster, as a shared file system gives it; --out on it too
A failure restarts all workers from the newest checkpoint of --out. So does a second start: unlike train.py, the same
--out means the same run. `ray job stop` ends the workers without a last checkpoint: up to --save_every steps are lost.
"""
import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def worker(job):
    """One process of the training. Ray has set RANK, WORLD_SIZE and the others, as torchrun does, and joined them."""
    os.chdir(job["cwd"])
    sys.path.insert(0, job["root"])
    import train
    saved = any(Path(job["settings"]["out"], "state").glob("step-*"))     # not the first attempt, or a run to continue
    train.main(train.Config(**job["settings"] | {"resume": saved}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, over all machines")
    parser.add_argument("--gpu", action="store_true", help="each worker gets a GPU; else a CPU core")
    parser.add_argument("--failures", type=int, default=3, help="how often all workers start again")
    parser.add_argument("flags", nargs="*", help="after --: the flags of train.py; --out is needed")
    o = parser.parse_args()
    if o.workers < 1:
        raise SystemExit(f"--workers={o.workers}: must be at least 1")
    sys.path.insert(0, str(ROOT))
    import train
    from nanopath.run import parse_run
    cfg = parse_run(train.Config, train.PRESETS, train.__doc__, o.flags)           # a wrong flag ends here, in one line
    if not cfg.out:
        raise SystemExit("give the run a folder that all machines see, after the two dashes: -- --out=/shared/out/NAME")
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise SystemExit(f"this needs Ray: pip install 'ray[train]==2.60.0' ({error})") from None
    job = {"cwd": os.getcwd(), "root": str(ROOT), "settings": vars(cfg) | {"out": str(Path(cfg.out).resolve())}}
    trainer = TorchTrainer(worker, train_loop_config=job, torch_config=TorchConfig(backend="nccl" if o.gpu else "gloo"),
                           scaling_config=ScalingConfig(num_workers=o.workers, use_gpu=o.gpu),
                           run_config=RunConfig(failure_config=FailureConfig(max_failures=o.failures)))
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise SystemExit(f"the training failed: {str(error).strip().splitlines()[-1]}. What was saved is complete: run "
                         "the same command again") from None


if __name__ == "__main__":
    main()
