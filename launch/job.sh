# shellcheck shell=bash
# What the launch files share. Sourced, not run; launch/README.md explains it.

# Print the reason and end the job: it could never work.
fail() {
    echo "error: $*" >&2
    exit 2
}

# has_flag NAME ARGUMENTS...: whether --NAME, --NAME=... or the same with '-' for '_' is among the arguments.
has_flag() {
    local name=$1 argument
    shift
    for argument in "$@"; do
        argument=${argument%%=*}
        if [[ ${argument//-/_} == "__$name" ]]; then return 0; fi
    done
    return 1
}

# must_be_a_count NAME VALUE
must_be_a_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: must be a whole number of at least 1"
}

# Go to the repository and set what the user has not set.
prepare() {
    local home=$1
    cd "$home" || fail "$home is not there"
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -f .venv/bin/activate ]]; then
        # shellcheck source=/dev/null
        source .venv/bin/activate
    fi
    command -v torchrun >/dev/null || fail "no torchrun; make .venv with scripts/setup.sh, or activate your environment"
    # One rank a GPU. SLURM says how many it gave (--gpus-per-node); without any, one rank computes on the CPU.
    nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    must_be_a_count NPROC_PER_NODE "$nproc"
    must_be_a_count MAX_FRUITLESS "${MAX_FRUITLESS:-3}"
    # More threads than cores slow every rank down; torchrun's own default of 1 leaves cores idle.
    local cores=${SLURM_CPUS_PER_TASK:-$(nproc --all)}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / nproc > 0 ? cores / nproc : 1))}
    export PYTHONUNBUFFERED=1
    # A disk of each node's own: every node downloads once. Without it HF_HOME is shared, and the cluster downloads once.
    if [[ -n ${LOCAL_DISK:-} ]]; then export HF_HOME=$LOCAL_DISK/huggingface; fi
    # With MAX_RESTARTS on several nodes: without it restarted ranks look for those of their earlier life.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # torchrun kills ranks this many seconds after it passed SIGTERM on; they save in that time. Less than the lead of
    # '#SBATCH --signal', so that the script is still alive afterwards.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}
}

# collect_arguments ARGUMENTS...: set the array `arguments`, those of train.py, for this job or task of an array.
collect_arguments() {
    arguments=("$@")
    local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
    if [[ -n ${SWEEP:-} ]]; then
        [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "SWEEP=$SWEEP needs a job array: sbatch --array=1-N"
        local line words extra number=$SLURM_ARRAY_TASK_ID
        line=$(sed -n "${number}p" "$SWEEP") || fail "SWEEP=$SWEEP cannot be read"
        if [[ -z ${line//[[:space:]]/} ]]; then
            ((number > $(grep -c '' "$SWEEP"))) || fail "$SWEEP: line $number is empty; write a task's flags there or remove it"
            fail "$SWEEP has no line $number; submit with --array=1-$(grep -c '' "$SWEEP")"
        fi
        # xargs reads quotes as a shell does, and runs nothing
        words=$(xargs -n 1 printf '%s\n' <<<"$line" 2>/dev/null) || fail "$SWEEP: line $number has an unmatched quote: $line"
        mapfile -t extra <<<"$words"
        arguments+=("${extra[@]}")
    fi
    if ! has_flag output_dir "${arguments[@]}" && ! has_flag config "${arguments[@]}"; then
        arguments+=(--output_dir "runs/${SLURM_JOB_NAME:-fsdp-qlora}-$job")
    fi
}

# requeue_says [--signalled] begin|end: ask whether to go on; the answer is the exit code.
requeue_says() {
    python -m fsdp_qlora.requeue --max_fruitless "${MAX_FRUITLESS:-3}" "$@" "${arguments[@]}"
}

# train TORCHRUN...: run that command on every node, with train.py and its arguments; afterwards end the job, or put it back
# into the queue.
train() {
    local answer=0 code=0
    signalled=()
    requeue_says begin || answer=$?
    if [[ $answer != 0 ]]; then exit "$answer"; fi

    # As a step of srun, on one node too: on preemption SLURM signals steps, and not this script.
    # --cpus-per-task: a step does not inherit it from the job since SLURM 22.05, and would have one core.
    # --wait: once one node has ended, the others have two minutes to end by themselves (a rank may still be saving). No
    # --kill-on-bad-exit: torchrun exits with 1 after a signal, and the node that ends first must not kill the others.
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --kill-on-bad-exit=0 --wait=120 "$@" train.py "${arguments[@]}" &
    local launcher=$!
    # --signal=B:USR1@... before the time limit; TERM on preemption, scancel and scontrol requeue
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    # a trapped signal ends `wait` early, with a code above 128, while the launcher is still saving
    while true; do
        code=0
        wait "$launcher" || code=$?
        kill -0 "$launcher" 2>/dev/null || break
    done
    echo "launcher ended with exit code $code"

    answer=0
    requeue_says "${signalled[@]}" end || answer=$?
    if [[ $answer == 75 ]]; then
        # In any other state SLURM itself has ended the job: 'scontrol requeue' has put it back already, and after scancel
        # it must not come back.
        local state
        state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")
        if [[ $state != RUNNING ]]; then
            echo "SLURM has ended the job itself (${state:-gone}); not requeued from here"
            exit 0
        fi
        scontrol requeue "$SLURM_JOB_ID" || fail "scontrol could not requeue job $SLURM_JOB_ID; submit it again to go on"
        exit 0
    fi
    # torchrun exits with 1 after a signal although all ranks saved; a complete run is a success
    exit "$answer"
}

# pass_on SIGNAL: the trap. Once is enough: ranks that get a second signal end without saving. So only USR1 is passed on,
# which comes to this script alone; TERM SLURM sends to the torchruns itself. It goes through scancel, since srun takes a
# SIGTERM as the order to kill the step.
pass_on() {
    echo "received SIG$1: the ranks save and stop"
    if [[ $1 == USR1 && ${#signalled[@]} == 0 ]]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
    signalled=(--signalled)
}
