# make demo   set up, build, run the main job on the demo model; writes out/demo.json
# make test   set up, build, all tests, sanitizers, fuzzers: what CI requires
# make build  set up and build the release preset (build/release/thriftattn)
# make setup  install the Debian packages that are missing (as root or with sudo)
# make clean  remove build/ and out/
.PHONY: build demo test setup clean
.DEFAULT_GOAL := build

setup:
	@tools/setup.sh

build: setup
	@tools/build.sh release

demo: build
	@tools/demo.sh

test: setup
	@tools/test.sh

clean:
	rm -rf build out
