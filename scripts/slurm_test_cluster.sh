#!/usr/bin/env bash
# A real SLURM on this machine, for tests: one controller and several nodes that are processes of this host.
#   scripts/slurm_test_cluster.sh start DIR [NODES]    then: export SLURM_CONF=DIR/slurm.conf
#   scripts/slurm_test_cluster.sh stop DIR
# Needs Debian's packages (apt-get install slurm-wlm munge) and root. Nothing outside DIR is written. The nodes claim 8 GPUs
# and 64 CPUs each, which SLURM counts and nothing checks, so that the launch files run unchanged on a laptop's CPU. Tests that
# use it: python -m pytest -m cluster tests/slurm
set -euo pipefail

usage() { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }

[[ $# -ge 2 ]] || usage
command=$1 dir=$(realpath -m "$2") nodes=${3:-2}
port=${SLURM_TEST_PORT:-17100} # of the controller; those of the nodes follow

configure() {
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
# two queues on the same nodes: a job of 'urgent' puts one of 'main' back into its queue, two minutes after telling it
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=64 RealMemory=16000 Gres=gpu:8 State=UNKNOWN
CONF
    local node
    for ((node = 1; node <= nodes; node++)); do
        echo "NodeName=n$node NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + node))" >>"$dir/slurm.conf"
    done
    cat >>"$dir/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
    # SLURM counts the files of a GPU and does not open them
    touch "$dir"/gpu{0..7}
    echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
}

start() {
    for tool in munged slurmctld slurmd sbatch; do
        command -v "$tool" >/dev/null || { echo "error: no $tool; apt-get install slurm-wlm munge" >&2; exit 2; }
    done
    mkdir -p "$dir/state"
    chmod 755 "$dir"
    configure
    export SLURM_CONF=$dir/slurm.conf
    head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 600 "$dir/munge.key"
    # --force: munge warns of a key that root owns
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>>"$dir/munged.log"
    slurmctld -c
    local node
    for ((node = 1; node <= nodes; node++)); do
        mkdir -p "$dir/spool-n$node"
        slurmd -N "n$node"
    done
    for _ in $(seq 60); do
        if [[ $(sinfo --noheader --format %t --partition main 2>/dev/null) == idle ]]; then
            echo "$nodes nodes are ready; export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "error: the nodes did not come up; see the logs in $dir" >&2
    sinfo >&2 || true
    exit 1
}

stop() {
    local file
    # jobs outlive the daemons otherwise
    SLURM_CONF=$dir/slurm.conf timeout 10 scancel --signal=KILL --full --user="$(id -un)" 2>/dev/null || true
    SLURM_CONF=$dir/slurm.conf timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    sleep 2
    for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        [[ -f $file ]] || continue
        kill "$(<"$file")" 2>/dev/null || true
    done
}

case $command in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
