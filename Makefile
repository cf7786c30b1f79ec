# make demo   set up, build, run the main job on the demo model; writes out/demo.json
# make test   set up, build, all tests, sanitizers, fuzzers: what CI requires
# make build  set up and build the release preset (build/release/thriftattn)
# make setup  install the Debian packages that are missing (as root or with sudo)
# make cuda-all   every CUDA target for every head_dim, its log in build/cuda-all/build.log
# make emulate    the CUDA kernels' tests on this CPU, all of them (make test runs the short ones)
# make gpu-test   the GPU tests, on a machine with an NVIDIA GPU
# make gpu-sanitize  those of the kernels under compute-sanitizer, memcheck then racecheck
# make gpu-bench  timings on such a machine, into out/gpu-bench.jsonl
# make clean  remove build/ and out/
.PHONY: build demo test setup clean cuda-all emulate gpu-test gpu-sanitize gpu-bench
.DEFAULT_GOAL := build

setup:
	@tools/setup.sh

build: setup
	@tools/build.sh release

demo: build
	@tools/demo.sh

test: setup
	@tools/test.sh

cuda-all:
	@tools/build.sh cuda-all

emulate:
	@tools/emulate.sh

gpu-test:
	@tools/gpu.sh test

gpu-sanitize:
	@tools/gpu.sh sanitize memcheck
	@tools/gpu.sh sanitize racecheck

gpu-bench:
	@tools/gpu.sh bench

clean:
	rm -rf build out
