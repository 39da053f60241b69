#!/bin/bash
# Qwen2.5-32B with ReMax on GSM8K, four nodes of 8 GPUs: two train and two answer (conf/qwen2_5_32b_split.yaml):
#
#     sbatch slurm/remax_32b_split.sh [key=value ...]
#
# from the repository's root. sbatch's own options (--nodes, --time, --mem ...) go before the script's name and win over
# the lines below; what is the same for all jobs of a site is in slurm/site.sh, what a job does in slurm/job.sh.

#SBATCH --job-name=remax-32b-split
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=500G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# sbatch runs a copy of this file in a folder of its own, so the repository is where sbatch was called, or REMAX_HOME.
home=${REMAX_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [ ! -r "$home/slurm/job.sh" ]; then
    echo "error: $home is not the repository of remax-megatron; call sbatch from its root, or set REMAX_HOME to it" >&2
    exit 2
fi
exec bash "$home/slurm/job.sh" qwen2_5_32b_split "$@"
