#!/usr/bin/env bash
# Installs requirements/gpu.txt and this package into a virtual environment; `make install-gpu` calls it.
#
#     install_gpu.sh VENV          VENV is made, or completed; run it from the repository's root
#
#   PYTHON       interpreter that makes VENV, Python 3.12          (default: the one that PATH or pyenv has)
#   TE           0: without Transformer Engine                     (default 1)
#   LEAVE_OUT    packages that are left out, as NAME|NAME          (default none)
#   EXTRA_INDEX  one more package index                            (default none)
#   MAX_JOBS     compilers at once; each takes up to 2 GB          (default 8, or the cores if fewer)
#
# All packages are wheels except Transformer Engine's torch extension, which is compiled against the torch that was
# installed before it: 12 to 15 minutes on two cores, less where a built one can be downloaded (its own set-up looks for
# one first). It needs a C++ compiler; CUDA's and cuDNN's headers are those of the nvidia wheels in the lock. Where that
# does not work, Transformer Engine is left out and one line says so: a part of it alone would keep megatron-core from
# being imported.
set -euo pipefail

venv=$1
requirements=requirements/gpu.txt
transformer_engine='^transformer-engine'

is_3_12() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }
candidates=(python3.12 python3 ~/.pyenv/versions/3.12.*/bin/python)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
python=
for candidate in "${candidates[@]}"; do
  if is_3_12 "$candidate"; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || {
  echo "error: no Python 3.12, which the GPU stack is locked for (tried ${candidates[*]}); set PYTHON_GPU to one" >&2
  exit 1
}
if [ -x "$venv/bin/python" ] && ! is_3_12 "$venv/bin/python"; then
  echo "error: $venv is of another Python; run make clean first" >&2
  exit 1
fi
say() { echo "install: $*"; }
pip_install() { # not echoed, because an index address may carry a password
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile --no-deps \
    ${EXTRA_INDEX:+--extra-index-url "$EXTRA_INDEX"} "$@"
}
pins() { grep -E "$1" "$requirements" | cut -d' ' -f1; }

say "$venv"
"$python" -m venv "$venv"
rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
grep -vE "$transformer_engine${LEAVE_OUT:+|^($LEAVE_OUT)==}" "$requirements" >"$rest"
say "$requirements"
pip_install -qq -r "$rest"
say remax-megatron
pip_install -qq --no-build-isolation -e .

without() {
  mapfile -t parts < <(pins "$transformer_engine" | cut -d= -f1)
  "$venv/bin/python" -m pip uninstall -q -y "${parts[@]}" 2>/dev/null
  say "without Transformer Engine ($1): the policy takes Megatron's local layers"
}
if [ "${TE:-1}" = 0 ]; then
  without "TE=0"
elif ! command -v "${CXX:-c++}" >/dev/null; then
  without "no C++ compiler: install g++, or set CXX"
else
  say "Transformer Engine: its torch extension is compiled now, which takes minutes"
  nvidia=$("$venv/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
  cores=$(nproc)
  log=$venv/transformer-engine.log
  mapfile -t wheels < <(pins "$transformer_engine" | grep -v torch)
  if pip_install -qq "${wheels[@]}" &&
    CUDA_HOME=$nvidia/cu13 CUDNN_PATH=$nvidia/cudnn CPATH=$nvidia/cu13/include${CPATH:+:$CPATH} \
      NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-$((cores < 8 ? cores : 8))} \
      pip_install -v --no-build-isolation "$(pins '^transformer-engine-torch==')" >"$log" 2>&1 &&
    "$venv/bin/python" -c 'import torch, transformer_engine.pytorch' >>"$log" 2>&1; then
    say "$(pins '^transformer-engine-torch==')"
  else
    without "it could not be compiled or loaded: the end of $log says why"
  fi
fi
