#!/bin/bash
# Fills in launch/gke.yaml and gives it to kubectl.
#
#   launch/gke.sh --name=ebt --image=IMAGE --claim=runs --topology=4x4x8 \
#       -- --config=experiments/text.py:size=xl --workdir=/runs/xl
#
#   --name=NAME         of the JobSet
#   --image=IMAGE       container with bash, python, jax[tpu] and ebt_jax
#   --claim=NAME        persistent volume claim, mounted at /runs by all pods
#                       (ReadWriteMany: Filestore, Lustre or Cloud Storage FUSE)
#   --topology=AxBxC    of a slice, in chips; 4x4x8 is a v5p-256
#   --accelerator=TYPE  label of the node pool (default tpu-v5p-slice)
#   --chips=N           of a host (default 4)
#   --slices=N          slices (default 1); give --config.mesh.slices=N as well
#   --retries=N         restarts of all pods (default 100)
#   --dry_run           prints the manifest and applies nothing
#
# What stands behind -- are flags of ebt train; the workdir lies under /runs.

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
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

name="" image="" claim="" topology="" accelerator=tpu-v5p-slice chips=4 slices=1
retries=100 dry_run=""
while (($#)); do
    case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --) shift && break ;;
    *) fail "unexpected '$1'; flags of ebt train stand behind --" ;;
    esac
    shift
done
for flag in name image claim topology; do
    [[ -n ${!flag} ]] || fail "--$flag is missing; see the head of launch/gke.sh"
done
for flag in name image claim accelerator; do
    [[ ${!flag} =~ ^[[:alnum:]][[:alnum:]_./:@-]*$ ]] ||
        fail "--$flag=${!flag} holds a character that is not allowed there"
done
for flag in chips slices; do
    [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag=${!flag} is not a positive number"
done
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries is not a number; give 0 or more"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    fail "--topology=$topology is not a topology; write it as 4x4x8"
total=$((${topology//x/*}))
((total % chips == 0)) ||
    fail "--topology=$topology has $total chips, which --chips=$chips does not divide"
[[ " $* " == *" --config="* ]] || fail "--config is missing behind --"
[[ " $* " == *" --workdir=/runs"* ]] ||
    fail "--workdir behind -- has to lie under /runs, where the claim is mounted"
[[ "$*" != *$'\n'* ]] || fail "a flag holds a line break; the manifest cannot"

flags=$(show "$@")
while IFS= read -r line; do
    [[ $line != "#"* ]] || continue
    # Quoted, or an & in a flag would stand for what was matched (bash 5.2).
    line=${line//@NAME@/"$name"}
    line=${line//@IMAGE@/"$image"}
    line=${line//@CLAIM@/"$claim"}
    line=${line//@TOPOLOGY@/"$topology"}
    line=${line//@ACCELERATOR@/"$accelerator"}
    line=${line//@CHIPS@/"$chips"}
    line=${line//@SLICES@/"$slices"}
    line=${line//@HOSTS@/"$((total / chips))"}
    line=${line//@RETRIES@/"$retries"}
    line=${line//@FLAGS@/"$flags"}
    printf '%s\n' "$line"
done <"$(dirname "$0")/gke.yaml" |
    if [[ -n $dry_run ]]; then cat; else kubectl apply -f -; fi
