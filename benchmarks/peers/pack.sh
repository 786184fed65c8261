#!/usr/bin/env bash
# Packs the GPU peers that a machine without a network lacks: SonicMoE with its tuning results, and tokamax.
# Usage: benchmarks/peers/pack.sh TUNING OUT
#   TUNING  archive of SonicMoE's tuning results and compiled kernels, which holds the folder `qc`. They are
#           found by the exact versions in sonicmoe.txt: with others its tuner takes minutes a shape.
#   OUT     folder for sonicmoe.tar.xz (46 MB) and tokamax.tar.xz (4 MB), for CPython 3.12 on x86-64 Linux.
# There:    python3 -m tarfile -e OUT/sonicmoe.tar.xz DIR/sonicmoe; python3 -m tarfile -e OUT/tokamax.tar.xz DIR/tokamax
#           and name the folders to benchmarks/moe_layer.py --sonicmoe, benchmarks/grouped_matmul.py --tokamax.
set -euo pipefail
tuning=$(realpath "${1:?usage: pack.sh TUNING OUT}"); mkdir -p "${2:?usage: pack.sh TUNING OUT}"; out=$(realpath "$2")
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

platforms=(); for n in 39 38 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
unpacked() { # NAME: the wheels of NAME.txt, in order, in one folder
  mkdir -p "$work/wheels/$1" "$work/$1"
  while read -r package; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      "${platforms[@]}" --platform manylinux2014_x86_64 -d "$work/wheels/$1/$package" "$package"
    unzip -qo "$work/wheels/$1/$package"/*.whl -d "$work/$1"
  done <"$here/$1.txt"
}
packed() { # NAME
  tar c --sort=name --owner=0 --group=0 -C "$work/$1" . | xz --x86 --lzma2=preset=9e,dict=256MiB >"$out/$1.tar.xz"
}

unpacked sonicmoe
(cd "$work/sonicmoe" && rm -rf build_backend.py ./*.pth nvidia_cutlass_dsl/include)
tar xJf "$tuning" -C "$work/sonicmoe"
packed sonicmoe

unpacked tokamax
# Only its profiling needs xprof, a package of many megabytes, but importing tokamax imports it.
mkdir -p "$work/tokamax/xprof/cli"
touch "$work/tokamax/xprof/__init__.py" "$work/tokamax/xprof/cli/__init__.py"
echo 'get_kernel_stats_tool = None' >"$work/tokamax/xprof/cli/tools.py"
packed tokamax
ls -l "$out"
