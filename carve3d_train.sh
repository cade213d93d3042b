#!/usr/bin/env bash
# Trains Carve3D. The first run makes .venv and installs the pinned requirements; later ones start in seconds.
#
#   bash carve3d_train.sh                            the small world (config/tiny.py) on this machine's GPUs or CPU
#   bash carve3d_train.sh --config.seed=1            the same with other keys; --config=FILE for another configuration
#   bash carve3d_train.sh NUM_NODES [trainer flags]  the published run (config/dgx.py:carve3d_train unless --config is
#                                                    given) on NUM_NODES machines with all their GPUs. With more than
#                                                    one, start it on each, with MASTER_ADDR and MASTER_PORT (a free
#                                                    port of machine 0) and RANK (0 ... NUM_NODES-1) in the environment.
#   bash carve3d_train.sh --rehearse CONFIG [flags]  walks the whole path of CONFIG, as config/dgx.py:instant3d_grm, with
#                                                    small random weights on CPUs in two minutes: tools/rehearse.py
#
# CARVE3D_PROCESSES=N  processes on this machine, instead of one per GPU, or one per core and at most 2 without GPUs
# CARVE3D_VENV=FOLDER  the environment to make or use instead of .venv; "system": the python3 on PATH as it is
# CARVE3D_DRY_RUN=1    install nothing and print the command that would be run
# CARVE3D_DEBUG=1      show where an error that is told in one sentence comes from
#
# Exit status: 2 after a mistake that the sentence on the screen tells how to mend, 1 after any other error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_env.sh

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' carve3d_train.sh
}

count_gpus() {  # GPUs that CUDA_VISIBLE_DEVICES leaves and, unless it is a dry run, torch can use
    local gpus=0
    if command -v nvidia-smi >/dev/null; then
        gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
    fi
    if [ "$gpus" -gt 0 ] && [ -z "${CARVE3D_DRY_RUN:-}" ]; then
        gpus="$("$VENV_PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    fi
    echo "$gpus"
}

count_cores() {  # whatever OMP_NUM_THREADS is, which nproc would answer
    env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

is_count() {
    [[ "$1" =~ ^[1-9][0-9]*$ ]]
}

power_of_two_up_to() {
    local power=1
    while [ $((2 * power)) -le "$1" ]; do
        power=$((2 * power))
    done
    echo "$power"
}

check() {  # check PROCESSES [trainer flags]: in two seconds, instead of when all processes have started
    local device=cpu
    [ "$gpus" -eq 0 ] || device=cuda
    [ -n "${CARVE3D_DRY_RUN:-}" ] || "$VENV_PYTHON" -m tools.check_config --device "$device" --processes "$@" >/dev/null
}

start() {
    if [ -n "${CARVE3D_DRY_RUN:-}" ]; then
        echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-} $*"
        exit 0
    fi
    exec "$@"
}

# torchrun, because `accelerate launch` would let a default configuration of the user's change the run, and starts a
# single process on CPUs; through tools/launch.py, which ends as the processes end
torchrun() {  # torchrun PROCESSES_ON_THIS_MACHINE [flags of torchrun] carve3d_train.py [trainer flags]
    local processes="$1" cores threads
    shift
    cores="$(count_cores)"
    threads=$((cores / processes))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    start "$VENV_PYTHON" -m tools.launch --nproc_per_node "$processes" "$@"
}

for flag in "$@"; do
    case "$flag" in
        -h | --help) usage; exit 0 ;;
    esac
done
# what a run that is stopped says to type; a command around this one may have set it
export CARVE3D_COMMAND="${CARVE3D_COMMAND:-bash carve3d_train.sh$([ $# -eq 0 ] || printf ' %q' "$@")}"
if [ "${1:-}" = --rehearse ]; then
    case "${2:-}" in
        "" | -*) fail "--rehearse needs a configuration: write 'bash carve3d_train.sh --rehearse config/dgx.py:instant3d_grm'" ;;
    esac
    [ -n "${CARVE3D_DRY_RUN:-}" ] || setup_env
    shift
    start "$VENV_PYTHON" -m tools.rehearse --config "$@"
fi

nodes=""
case "${1:-}" in
    "" | -[!0-9]*) default_config=config/tiny.py ;;
    *)
        is_count "$1" || fail "'$1' is neither a number of machines nor a flag: write 'bash carve3d_train.sh', 'bash carve3d_train.sh --config.KEY=VALUE' or 'bash carve3d_train.sh NUM_NODES'"
        nodes="$1"
        default_config=config/dgx.py:carve3d_train
        shift
        ;;
esac

configuration="" given="" before=""
for flag in "$@"; do
    case "$before" in
        --config | -config) configuration="$flag" ;;
    esac
    case "$flag" in
        --config | -config) given=1 ;;
        --config=* | -config=*) given=1 configuration="${flag#*=}" ;;
    esac
    before="$flag"
done
if [ -z "$given" ]; then
    configuration="$default_config"
    set -- --config "$configuration" "$@"
fi

if [ "${nodes:-1}" -gt 1 ]; then
    for name in MASTER_ADDR MASTER_PORT RANK; do
        [ -n "${!name:-}" ] || fail "$name is not set: a run on $nodes machines needs MASTER_ADDR and MASTER_PORT (of machine 0) and RANK (0 to $((nodes - 1))) in the environment of each"
    done
    [[ "$RANK" =~ ^[0-9]+$ ]] && [ "$RANK" -lt "$nodes" ] || fail "RANK is '$RANK': with $nodes machines it must be a number from 0 to $((nodes - 1))"
fi
if [ -n "${CARVE3D_PROCESSES:-}" ]; then
    is_count "$CARVE3D_PROCESSES" || fail "CARVE3D_PROCESSES is '$CARVE3D_PROCESSES': set it to a number of processes, 1 or more"
fi

[ -n "${CARVE3D_DRY_RUN:-}" ] || setup_env
gpus="$(count_gpus)"

if [ "${nodes:-1}" -gt 1 ]; then
    [ "$gpus" -gt 0 ] || fail "this machine has no GPU that torch can use, and a run on $nodes machines needs them: without GPUs, 'bash carve3d_train.sh' runs the small world"
    per_node="${CARVE3D_PROCESSES:-$gpus}"
    # RANK is the machine's number here; the processes get their own from the launcher
    check $((nodes * per_node)) "$@"
    rank="$RANK" address="$MASTER_ADDR" port="$MASTER_PORT"
    unset RANK MASTER_ADDR MASTER_PORT
    torchrun "$per_node" --nnodes "$nodes" --node_rank "$rank" --master_addr "$address" --master_port "$port" \
        --rdzv_conf timeout=3600 carve3d_train.py "$@"
fi

if [ -n "${CARVE3D_PROCESSES:-}" ]; then
    processes="$CARVE3D_PROCESSES"
elif [ "$gpus" -eq 0 ]; then
    processes="$(count_cores)"
    processes=$((processes < 2 ? processes : 2))
else
    case "$configuration" in
        *config/tiny.py*) processes="$(power_of_two_up_to "$gpus")" ;;  # its 64 samples must be shared evenly
        *) processes="$gpus" ;;
    esac
fi
check "$processes" "$@"
torchrun "$processes" --standalone carve3d_train.py "$@"
