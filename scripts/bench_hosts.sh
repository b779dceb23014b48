#!/usr/bin/env bash
# Runs a torchrun program on two "hosts", two network namespaces of this machine with a veth between them. Needs root.
#
#   HXCOMM_INSECURE=1 bash scripts/bench_hosts.sh 1 -m hxcomm.bench --compare gloo --ops all_reduce --sizes 16KiB,16MiB
#   HXCOMM_SECRET=... HXCOMM_SECURITY=mac bash scripts/bench_hosts.sh 2 examples/tp_decode/generate.py --backend hxcomm
#
# The first argument is the number of ranks of each host. Shown is what the first host prints.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

readonly LIMIT_S=300
[[ $# -ge 2 && $1 =~ ^[0-9]+$ ]] || fail "usage: bash scripts/bench_hosts.sh RANKS_OF_A_HOST PROGRAM [ARGUMENT ...]"
[[ $EUID == 0 ]] || fail "network namespaces need root"
command -v ip >/dev/null || fail "the command 'ip' is missing: apt-get install iproute2"
ranks=$1
shift

hosts=("hxbench$$a" "hxbench$$b")
output="$(mktemp)"
cleanup() {
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2>/dev/null | xargs --no-run-if-empty kill -9
    ip netns delete "$host" 2>/dev/null
  done
  rm -f "$output"
}
trap cleanup EXIT
for host in "${hosts[@]}"; do ip netns add "$host"; done
ip link add eth0 netns "${hosts[0]}" type veth peer name eth0 netns "${hosts[1]}"
for number in 0 1; do
  ip -n "${hosts[$number]}" address add "10.9.0.$((number + 1))/24" dev eth0
  for link in lo eth0; do ip -n "${hosts[$number]}" link set "$link" up; done
done

on_host() {
  ip netns exec "${hosts[$1]}" env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth0 timeout "$LIMIT_S" \
    torchrun --nnodes 2 --node-rank "$1" --nproc-per-node "$ranks" --master-addr 10.9.0.1 --master-port 29500 "${@:2}"
}
on_host 1 "$@" >"$output" 2>&1 &
if ! on_host 0 "$@"; then
  cat "$output" >&2
  exit 1
fi
wait
