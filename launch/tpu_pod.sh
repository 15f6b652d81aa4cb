#!/bin/bash
# Trains on a Cloud TPU slice of any size; asks for it, and for a new one when it is
# taken away.
#
#   launch/tpu_pod.sh --name=ebt --zone=us-east5-a --accelerator=v5p-256 \
#       --runtime=v2-alpha-tpuv5 --spot --setup='bash /shared/setup.sh' \
#       -- --config=experiments/text.py:size=xl --workdir=/shared/runs/xl
#
#   --name=NAME         of the queued resource and of the slice; an existing one is used
#   --zone=ZONE         where
#   --accelerator=TYPE  such as v5p-256
#   --runtime=VERSION   software of the TPU VMs, such as v2-alpha-tpuv5
#   --project=PROJECT   else gcloud's own setting
#   --spot              asks for Spot capacity, which may be taken away
#   --setup=COMMAND     run on every host of a new slice: install, mount storage
#   --python=PROGRAM    on the hosts (default python3)
#   --folder=FOLDER     on the hosts, where ebt train is started (default .)
#   --retries=N         new starts, on the same slice or a new one (default 100)
#   --poll=SECONDS      between looks at the request (default 60)
#   --dry_run           prints the commands and runs none
#
# What stands behind -- are flags of ebt train. The workdir has to be a folder that all
# hosts see. The slice is left running at the end; the last line says how to delete it.
#
# Exit code: that of ebt train. After 0, 2 (a mistake) and 3 (diverged) it ends; after
# 75, death by a signal or a lost connection it starts training again, on a new slice if
# the old one is gone. Ctrl-C and SIGTERM stop training on all hosts, which saves. Run it
# where it can stay: in tmux on a small VM, not on a laptop.

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

say() {
    echo "launch: $*" >&2
}

# Prints a command as one line for a shell.
show() {
    local word line=""
    for word in "$@"; do
        if [[ ! $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]]; then
            word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
        fi
        line+=" $word"
    done
    echo "${line:1}"
}

# Runs a command, or prints it.
run() {
    if [[ -n $dry_run ]]; then show "$@"; else "$@"; fi
}

name="" zone="" accelerator="" runtime="" project="" spot="" setup="" python=python3
folder=. retries=100 poll=60 dry_run="" told=0 ssh="" code=""
while (($#)); do
    case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --spot) spot=yes ;;
    --setup=*) setup=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --folder=*) folder=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift && break ;;
    *) fail "unexpected '$1'; flags of ebt train stand behind --" ;;
    esac
    shift
done
for flag in name zone accelerator runtime; do
    [[ -n ${!flag} ]] || fail "--$flag is missing; see the head of launch/tpu_pod.sh"
done
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries is not a number; give 0 or more"
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll is not a number of seconds; give 0 or more"
[[ " $* " == *" --config="* ]] || fail "--config is missing behind --"
[[ " $* " == *" --workdir="* ]] || fail "--workdir is missing behind --"

where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
ask=(
    gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}"
    --accelerator-type="$accelerator" --runtime-version="$runtime"
)
[[ -z $spot ]] || ask+=(--spot)
look=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    "--format=value(state.state)")
remove=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
train="cd $(show "$folder") && exec $(show "$python" -m ebt_jax train "$@" --distributed)"
# A lost connection leaves processes behind that hold the TPU. They get time to save.
# [e] keeps the pattern from matching the shell that runs this.
stop=$(
    cat <<'END'
pkill -TERM -f '[e]bt_jax train'; for _ in $(seq 120); do pgrep -f '[e]bt_jax train' >/dev/null || exit 0; sleep 1; done; pkill -KILL -f '[e]bt_jax train'; sleep 5
END
)

on_all_hosts() {
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# The state of the request; NONE where there is none, else gcloud's error.
state() {
    local answer
    if answer=$("${look[@]}" 2>&1); then
        echo "$answer"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "unknown: $answer"
    fi
}

# Makes sure that there is a slice that can be used.
provide() {
    if [[ -n $dry_run ]]; then
        run "${ask[@]}"
        run "${look[@]}"
        [[ -z $setup ]] || on_all_hosts "$setup"
        return
    fi
    local now seen="" asked=""
    while ((told == 0)); do
        now=$(state)
        # Later the network may be away for a while; at first it is a mistake.
        [[ $now != unknown* || -n $seen$code ]] || fail "$now"
        [[ $now == "$seen" ]] || say "the slice $name is $now"
        seen=$now
        case $now in
        ACTIVE) break ;;
        NONE)
            "${ask[@]}"
            asked=yes
            ;;
        FAILED)
            # What failed since we asked fails again: no capacity till a deadline, or
            # a request that cannot be met.
            [[ -z $asked ]] || fail "the request for $accelerator in $zone failed; ask for another, or later"
            "${remove[@]}"
            ;;
        SUSPENDED) "${remove[@]}" ;;
        esac
        sleep "$poll"
    done
    if ((told == 0)) && [[ -n $asked && -n $setup ]]; then
        say "sets up every host"
        on_all_hosts "$setup"
    fi
}

if [[ -n $dry_run ]]; then
    provide
    on_all_hosts "$train"
    echo "# when it ended with 75, or the connection was lost, at most $retries times:"
    on_all_hosts "$stop"
    on_all_hosts "$train"
    echo "# when the slice was taken away: all of the above, after"
    run "${remove[@]}"
    exit 0
fi

# A trap runs when `wait` is interrupted; `wait` is then asked again.
# shellcheck disable=SC2329  # the trap calls it
stop_all() {
    told=$((told + 1))
    [[ -n $ssh ]] || return 0
    say "stops training on all hosts"
    on_all_hosts "$stop" || true
}
trap stop_all INT TERM

for ((start = 0; start <= retries; start++)); do
    ((start == 0)) || say "starts again ($start of $retries) after exit code $code"
    provide
    ((start == 0 || told > 0)) || on_all_hosts "$stop" || true
    ((told == 0)) || break
    on_all_hosts "$train" &
    ssh=$!
    while :; do
        before=$told code=0
        wait "$ssh" || code=$?
        ((told > before)) || break
    done
    ssh=""
    ((told == 0)) || break
    # gcloud reports the first host's exit code that is not 0; ssh itself ends with 255.
    case $code in 0 | 2 | 3) break ;; esac
    ((code == 75 || code > 128)) || [[ $(state) != ACTIVE ]] || break
done
code=${code:-75} # a signal came before training began
say "ended with exit code $code; to delete the slice: $(show "${remove[@]}")"
exit "$code"
