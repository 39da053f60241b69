# shellcheck shell=bash
# shellcheck disable=SC2034  # job.sh uses what is set here
# What differs from one cluster to the next, in one place. Edit it once; remax_*.sh and job.sh stay as they are.
#
# job.sh reads this file inside every job. Part 1 is for sbatch itself, so it has to be read before, in the shell that
# submits:   source slurm/site.sh && sbatch slurm/remax_14b.sh
# Everything is optional. Variables written as ${NAME:-default} can also be set for one job: NAME=value sbatch ...

# -- 1. where jobs go --------------------------------------------------------------------------------------------------
# sbatch reads these; they win over the #SBATCH lines, and options on the command line win over them.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_TIMELIMIT=24:00:00
# How many seconds before the limit the run is told to save (600 in the scripts): more than a step with its checkpoint
# takes, and less than the limit, else the signal comes at the start.
# export SBATCH_SIGNAL=B:USR1@1800
# export SBATCH_MEM_PER_NODE=0
# (0: all of a node's memory.) CPUs have no such variable: sbatch --cpus-per-task=64 slurm/remax_14b.sh

# -- 2. modules --------------------------------------------------------------------------------------------------------
# Batch shells may not know `module`: then source its set-up first.
# source /etc/profile.d/modules.sh
# module load cuda/13.0

# -- 3. Python ---------------------------------------------------------------------------------------------------------
# The interpreter that has the packages of requirements/gpu.txt. Empty: .venv/bin/python of the repository if it is
# there, else python3 on PATH. It has to exist under this path on every node.
REMAX_PYTHON=${REMAX_PYTHON:-}

# -- 4. container ------------------------------------------------------------------------------------------------------
SRUN_ARGS=()
LAUNCH=()
# Either srun starts it (the pyxis plugin): options for srun. The repository, the data and the runs have to be mounted
# under their own paths, and REMAX_PYTHON is the one inside the image. Settings are then checked by the run alone.
# SRUN_ARGS=(--container-image=/images/remax.sqsh "--container-mounts=$PWD,$HOME/data" "--container-workdir=$PWD")
# REMAX_PYTHON=python3
# Or a command starts it (apptainer): words in front of the command that every node runs.
# LAUNCH=(apptainer exec --nv --bind "$PWD" /images/remax.sif)
# REMAX_PYTHON=python3

# -- 5. network --------------------------------------------------------------------------------------------------------
# Several nodes: the interface for NCCL's and gloo's connections, where the first one that they find is the wrong one
# (`ip -brief address` on a node lists them), and the InfiniBand adapters.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# -- 6. environment ----------------------------------------------------------------------------------------------------
# Compute nodes without internet: download the model and the data on a login node first, then
# export HF_HUB_OFFLINE=1 WANDB_MODE=offline
# export HF_HOME=/scratch/$USER/huggingface
# Threads of a rank on the CPU. Unset: the node's CPUs shared out among its ranks, 8 at most; 1 in a job without GPUs.
# export OMP_NUM_THREADS=8

# -- 7. restarts -------------------------------------------------------------------------------------------------------
# How many times in a row a job that failed is put back into the queue, to resume from its last checkpoint. Settings
# that the check before the start finds wrong are never tried again. The time limit, preemption and lost nodes do not
# count and need no setting: after them a job is always put back.
REMAX_RESTARTS=${REMAX_RESTARTS:-0}
