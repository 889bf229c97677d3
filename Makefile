# Every target sets itself up in .venv; PYTHON chooses the interpreter that .venv is made from.
PYTHON ?= python3
BIN := .venv/bin
# Idle OpenMP threads that spin would take the cores from the workers that load images.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install test test-slow test-clients test-cluster test-faults test-programs test-wheel lint quickstart mae channels cells nuclei clean

help:
	@echo "make quickstart   train, evaluate and look at a small FastVim on handwritten digits"
	@echo "make mae          pre-train one without labels, then show what that is worth with few labels"
	@echo "make channels     classify land cover from fewer and fewer bands of a satellite image"
	@echo "make cells        find the nuclei of cells in a microscope's images"
	@echo "make nuclei       find them one by one, each with a box and a mask"
	@echo "make test         install what the tests need and run them"
	@echo "make test-slow    those that take seconds each: whole programs, processes, signals"
	@echo "make test-faults  drawn faults: 600 sets of images, 1,000 command lines, 1,000 files, 320 kills and more"
	@echo "make test-programs  compiled and exported programs of every family"
	@echo "make test-cluster runs spread over processes and a Ray cluster on this machine, with kills"
	@echo "make test-clients what other libraries make of the models: segmentation_models_pytorch, transformers and more"
	@echo "make test-wheel   install the built wheel alone and run every command of it"
	@echo "make lint         formatting, lint, types and the import contract"
	@echo "make install      the environment alone: everything, editable, in .venv"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

test: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# All draws of faulty and of odd data, words and files; make test runs some of them. A name as
# test_a_command_line_ends_well[17] repeats one.
test-faults: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m "faults or not faults" tests/data/test_faults.py tests/faults \
	    tests/cli/test_option_ranges.py

# What torch.compile, torch.export and ONNX make of every family; make test-slow has some of them.
test-programs: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m "programs or not programs" \
	    tests/compile tests/export

# What needs Ray, or takes minutes: 20,000 images by every way of spreading them; trainings that get
# signals at random moments (FASTVIM_DRAWS of each kind, 5 without it) and lose processes.
test-cluster: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ray
	$(BIN)/python -m pytest tests/inference/test_over_ray.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "cluster or not cluster" \
	    tests/cluster tests/tasks/test_sharded.py
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python measurements/parts.py

# What `make install` leaves out: libraries that take the models.
test-clients: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[clients]"
	$(BIN)/python -m pytest -n auto --dist worksteal -m clients

# In an environment of its own, which it makes and removes.
test-wheel:
	$(PYTHON) tests/wheel_commands.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fastvim fastvim_cli
	$(BIN)/lint-imports --no-cache

quickstart: install
	$(BIN)/fastvim fit --config recipes/quickstart.yaml
	$(BIN)/fastvim test --config recipes/quickstart.yaml --ckpt_path last

FINETUNE := --config examples/digits/finetune.yaml
PROBE := --config examples/digits/probe.yaml
RANDOM := --model.checkpoint null --trainer.default_root_dir runs/mae/random_digits
mae: install
	$(BIN)/fastvim fit --config examples/digits/pretrain.yaml
	$(BIN)/fastvim fit $(FINETUNE) $(RANDOM)_finetune
	$(BIN)/fastvim fit $(FINETUNE)
	$(BIN)/fastvim fit $(PROBE) $(RANDOM)_probe
	$(BIN)/fastvim fit $(PROBE)
	@echo "100 labels, from random weights:"
	@$(BIN)/fastvim test $(FINETUNE) $(RANDOM)_finetune --ckpt_path last
	@echo "100 labels, from the pre-trained weights:"
	@$(BIN)/fastvim test $(FINETUNE) --ckpt_path last
	@echo "linear probe of random features:"
	@$(BIN)/fastvim test $(PROBE) $(RANDOM)_probe --ckpt_path last
	@echo "linear probe of the pre-trained features:"
	@$(BIN)/fastvim test $(PROBE) --ckpt_path last

# What training on sampled channels is for, on five Landsat bands.
channels: install
	$(BIN)/fastvim fit --config examples/land_cover/landsat.yaml
	$(BIN)/fastvim fit --config examples/land_cover/landsat.yaml --model.sample_channels false \
	    --trainer.default_root_dir runs/landsat_all
	$(BIN)/fastvim channels runs/landsat/model.safetensors runs/landsat_all/model.safetensors \
	    --names "sampled channels" "all channels" --root sample:landsat --out runs/landsat

# Crops of the last frame of HeLa cells, for pictures.
HELA = "$$($(BIN)/python -c 'from fastvim.data.samples import fetch; print(fetch("hela"))')"/images/validation/19-*.png

# Every pixel of HeLa cells, background or nucleus; what a threshold makes of them, for comparison.
SEMANTIC := --config examples/hela/semantic.yaml
cells: install
	$(BIN)/fastvim fit $(SEMANTIC)
	$(BIN)/fastvim test $(SEMANTIC) --ckpt_path last
	$(BIN)/python examples/hela/semantic_baselines.py
	rm -rf runs/hela/semantic/segments  # results of other weights
	$(BIN)/fastvim segment runs/hela/semantic/model.safetensors --out runs/hela/semantic/segments \
	    $(HELA)

# Each nucleus with a box and a mask; what the pieces above a threshold are worth, for comparison.
INSTANCES := --config examples/hela/instances.yaml
nuclei: install
	$(BIN)/fastvim fit $(INSTANCES)
	$(BIN)/fastvim test $(INSTANCES) --ckpt_path last
	$(BIN)/python examples/hela/instance_baseline.py
	rm -rf runs/hela/instances/detections
	$(BIN)/fastvim detect runs/hela/instances/model.safetensors --out runs/hela/instances/detections \
	    $(HELA)

clean:
	rm -rf .venv runs build *.egg-info
