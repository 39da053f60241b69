#!/bin/bash
# Qwen2.5-7B with a reward of your own, one node of 8 GPUs: the settings of conf/qwen2_5_7b.yaml and the changes below.
#
#     sbatch examples/slurm_job/own_7b.sh [key=value ...]
#
# from the repository's root. slurm/job.sh does the rest: torchrun on each node, a checkpoint before the time limit, and
# the job put back into the queue. docs/slurm.md explains it.

#SBATCH --job-name=remax-own-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=300G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

home=${REMAX_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
settings=(
    custom_reward_function.path="$home/examples/own_reward/reward.py"
    data.train_batch_size=512
    trainer.save_freq=5
    trainer.default_local_dir=runs/own-7b
)
exec bash "$home/slurm/job.sh" qwen2_5_7b "${settings[@]}" "$@"
