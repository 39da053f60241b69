#!/usr/bin/env bash
# What every job of slurm/remax_*.sh does: one torchrun per node on the job's nodes, a checkpoint before the time limit,
# and the job put back into the queue, where it resumes.
#
#     job.sh PRESET [key=value ...]      inside a batch job only; the arguments are those of python -m remax_megatron
#
# - Slurm sends USR1 to this shell before the time limit (--signal=B:USR1@600) and, at sites that say so, before
#   preemption. The trap makes the run's stop file; the trainer saves after its step, removes the file and exits 0; the
#   job is requeued and resumes from that checkpoint (trainer.resume_mode=auto). The same by hand:
#   scancel --batch --signal=USR1 JOBID
# - A run that ends by itself ends the job, with its exit code: 0 is complete, 2 wrong settings, else a rank failed.
#   REMAX_RESTARTS of site.sh requeues failed jobs.
# - After a lost node or a preemption without notice Slurm requeues (--requeue); the run resumes from its last
#   checkpoint, of which there is one every trainer.save_freq steps.
#
# Files of the job's own are runs/slurm/JOBID.* in the folder where sbatch was called. They and the run's folder have to
# be on a file system that all nodes share. Only options that Slurm has from 22.05 to 25.

fail() {
    echo "error: $*" >&2
    exit 2
}

# setting KEY DEFAULT [key=value ...]: what the overrides set KEY to (the last one holds), else DEFAULT.
setting() {
    local key=$1 value=$2 argument
    shift 2
    for argument in "$@"; do
        case $argument in "$key="* | "+$key="* | "++$key="*) value=${argument#*=} ;; esac
    done
    printf '%s\n' "$value"
}

say() {
    echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $*"
}

# shellcheck disable=SC2317  # the trap calls it
on_signal() {
    interrupted=yes
    [ "$stop_requested" = no ] || return 0
    stop_requested=yes
    touch "$stop_file"
    say "USR1, so the run will save after this step and end"
}

requeue() {
    say "$1; back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "error: the job could not be requeued; submit it again with the same settings, and it resumes" >&2
    exit 1
}

# All in one function: bash reads a script while it runs it, and this file may be edited while a job runs for days.
main() {
    local preset=$1
    shift
    [ -n "${SLURM_JOB_ID:-}" ] || fail "this is the body of a batch job; start it with sbatch slurm/remax_14b.sh"
    REMAX_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    [ -r "$REMAX_HOME/remax_megatron/__main__.py" ] || fail "$REMAX_HOME has no package remax_megatron beside slurm/"
    # shellcheck source=slurm/site.sh
    source "$REMAX_HOME/slurm/site.sh" # before `set -u`: environment modules do not bear it
    set -u

    local python=${REMAX_PYTHON:-$REMAX_HOME/.venv/bin/python}
    [ -n "$REMAX_PYTHON" ] || [ -x "$python" ] || python=python3
    export PYTHONPATH=$REMAX_HOME${PYTHONPATH:+:$PYTHONPATH} # the job stays in the folder where sbatch was called

    local nodes=$SLURM_JOB_NUM_NODES ranks cpus=${SLURM_CPUS_PER_TASK:-1}
    ranks=$(setting trainer.n_gpus_per_node "${SLURM_GPUS_ON_NODE:-}" "$@")
    [[ $ranks =~ ^[1-9][0-9]*$ ]] ||
        fail "'$ranks' ranks per node: the job has no GPUs; ask for --gpus-per-node, or set trainer.n_gpus_per_node"
    local threads=1 share=$((cpus / ranks))
    [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || threads=$((share < 1 ? 1 : share > 8 ? 8 : share))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

    [ -z "$(setting trainer.stop_file "" "$@")" ] || fail "trainer.stop_file is the job's own; leave it out"
    stop_file=$PWD/runs/slurm/$SLURM_JOB_ID.stop
    local failures_file=$PWD/runs/slurm/$SLURM_JOB_ID.failures failures
    mkdir -p "$PWD/runs/slurm" || fail "$PWD/runs cannot be written; call sbatch in a folder where it can"
    rm -f "$stop_file" # of the time before the restart
    local stopped=no
    stop_requested=no
    trap on_signal USR1

    local arguments=(--config-name "$preset" "trainer.nnodes=$nodes" "trainer.n_gpus_per_node=$ranks"
        "trainer.stop_file='$stop_file'" "$@")
    # A restart goes on, also where the settings ask for a run that is begun anew.
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$(setting trainer.resume_mode auto "$@")" = disable ]; then
        arguments+=(trainer.resume_mode=auto)
    fi
    # Wrong settings end the job here, within a second. Where srun starts the container, Python is only found inside.
    if [[ ${SRUN_ARGS[*]-} != *--container-* ]]; then
        ${LAUNCH[@]+"${LAUNCH[@]}"} "$python" -m remax_megatron.config.cli "${arguments[@]}" >/dev/null || exit
    fi

    local master port=$((20000 + SLURM_JOB_ID % 10000)) code # below the ports that systems hand out by themselves
    master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    say "$preset on $nodes x $ranks ranks, $OMP_NUM_THREADS threads each, master $master:$port, $(date -Is)"
    # Rendezvous is static: this node is the master whatever names and addresses it has, and its rank 0, which looks for
    # the stop file, sees it at once. --export=ALL, as the job may have been submitted with NONE; --cpus-per-task, as
    # srun does not take it from the job since 22.05; --kill-on-bad-exit, so that a node that fails ends the others.
    # torchrun is named as a module, because it is not on every PATH.
    # shellcheck disable=SC2016  # SLURM_NODEID differs from node to node
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --export=ALL --kill-on-bad-exit=1 ${SRUN_ARGS[@]+"${SRUN_ARGS[@]}"} ${LAUNCH[@]+"${LAUNCH[@]}"} \
        bash -c 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"' "$python" --nnodes "$nodes" \
        --nproc-per-node "$ranks" --master-addr "$master" --master-port "$port" -m remax_megatron "${arguments[@]}" &
    # A trap runs between commands, and a signal ends `wait` early: wait until it was the run that ended.
    interrupted=yes
    while [ $interrupted = yes ]; do
        interrupted=no
        wait $!
        code=$?
    done
    # The trainer removes the stop file when it stops: one that is left came too late, to a run that was complete.
    [ "$stop_requested" = no ] || [ -e "$stop_file" ] || stopped=yes
    rm -f "$stop_file"

    if [ $code = 0 ]; then
        rm -f "$failures_file"
        [ $stopped = no ] || requeue "saved"
        say "complete"
        exit 0
    fi
    failures=$(($(cat "$failures_file" 2>/dev/null || echo 0) + 1))
    if [ $code != 2 ] && [ "$failures" -le "$REMAX_RESTARTS" ]; then
        echo "$failures" >"$failures_file"
        requeue "failed with exit code $code, restart $failures of $REMAX_RESTARTS"
    fi
    rm -f "$failures_file"
    say "failed with exit code $code" >&2
    exit $code
}

main "$@"
