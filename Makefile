# LoomVideo: every target that runs something makes or refreshes .venv first.
# The first Python that fits; the environment script says so when none does.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && command -v "$$name" && exit; done; command -v python3)
# cpu or cuda; by default what the environment was made for, or else cuda where nvidia-smi lists a GPU.
ACCELERATOR ?=
EXTRAS ?=
VENV ?= .venv
BIN := $(VENV)/bin
PRESET ?= tiny
RUN ?=
ARGS ?=
DATA ?= data/sample
SHARDS ?= data/shards-$(PRESET)
FIGURES ?= data/figures
FIGURE_SHARDS ?= data/shards-figures-$(PRESET)
SUITES ?= sample
CHECKPOINT ?=

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev lock check-lock FORCE lint format check test test-pages test-fast fuzz sample-data shards figure-shards pretrain finetune-edit distill prefer evaluate serve demo readme-strip codec mlflow bench clean render submit validate doctor mlflow-server rehearse rehearse-fresh drill drill-training image kernels bench-data bench-prepare bench-cluster bench-kernels bench-generation bench-training bench-gpu

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

ENVIRONMENT = @"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	found=$$("$(PYTHON)" --version 2>&1) || found="$(if $(PYTHON),$(PYTHON) does not run,none was found)"; \
	echo "error: Python 3.11 to 3.13 is needed ($$found); install one (apt-get install python3 python3-venv) or name it: PYTHON=/path/to/python3.11" >&2; exit 2; }; \
	"$(PYTHON)" infra/setup/environment.py --venv "$(VENV)" $(if $(ACCELERATOR),--accelerator $(ACCELERATOR))

ifneq ($(ACCELERATOR),)
ifneq ($(ACCELERATOR),$(shell cat "$(VENV)/.accelerator" 2>/dev/null))
$(VENV)/.setup: FORCE
endif
endif

$(VENV)/.setup: pyproject.toml locks/base.txt locks/torch-cuda.txt locks/gpu.txt
	$(ENVIRONMENT)
	@touch "$@"

$(VENV)/.setup-%: $(VENV)/.setup locks/%.txt
	$(ENVIRONMENT) $*
	@touch "$@"

.PRECIOUS: $(VENV)/.setup-%
FORCE:

setup: $(VENV)/.setup $(addprefix $(VENV)/.setup-,$(EXTRAS)) ## make the environment in .venv: ACCELERATOR=cpu or cuda, EXTRAS="curate eval", PYTHON=
setup-dev: $(VENV)/.setup-dev ## the same with what the tests need

lock: $(VENV)/.setup-dev ## write locks/ after a change of pyproject.toml (ARGS=--upgrade: newest versions)
	$(BIN)/python infra/setup/locks.py write $(ARGS)

check-lock: $(VENV)/.setup-dev ## resolve locks/ for every accelerator, Python and machine; installs nothing
	@$(BIN)/python infra/setup/locks.py check

lint: $(VENV)/.setup-dev ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.setup-dev ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What a change breaks most often, for under three minutes; `make test-fast` has the rest.
TESTS ?= tests/test_architecture.py tests/test_pages.py tests/test_python_page.py tests/model/test_dit.py tests/model/test_packing.py tests/model/test_flow.py tests/platform/test_config.py tests/platform/shards tests/platform/training/test_parts.py tests/platform/training/test_packing.py tests/pipelines/sources tests/pipelines/training tests/jobs/weights tests/jobs/training

check: lint ## before a commit, under three minutes: format, lint, types of the public modules, quick tests (TESTS=…)
	$(BIN)/python infra/setup/check_types.py
	$(BIN)/pytest -m 'not slow and not gpu' $(TESTS)

test: lint check-lock ## lint, lock files and all tests: quick ones, then slow ones until 55 minutes have gone; a run that hangs ends after 84
	$(BIN)/pytest -v -o console_output_style=times --slow-until 55 --until 70 --end-at 84

test-pages: $(VENV)/.setup-dev ## every command of the tutorial and of the Python page, one after the other (use a quiet machine)
	$(BIN)/pytest --walkthrough -m walkthrough

test-fast: lint ## lint and the quick tests
	$(BIN)/pytest -m 'not slow'

fuzz: $(VENV)/.setup-dev ## random rows, tables, overrides, media and weights for MINUTES= (5); what fails is kept in .hypothesis
	LOOMVIDEO_FUZZ_MINUTES=$(or $(MINUTES),5) $(BIN)/python -m pytest tests/fuzz -q -x --timeout 0 $(ARGS)

sample-data: $(VENV)/.setup ## make the sample dataset (kept if it is there)
	$(BIN)/loomvideo data sample output=$(DATA)

shards: sample-data ## encode the sample dataset into shards (kept if they are fresh)
	$(BIN)/loomvideo data prepare preset=$(PRESET) input=$(DATA)/samples.jsonl output=$(SHARDS)

COMMA := ,

# Every edit has a figure of its own here, and sample-data four of each: prefer has garments that the editor never saw.
figure-shards: $(VENV)/.setup ## make and encode edits of 1,200 more figures, which prefer learns from as well (kept if they are fresh)
	$(BIN)/loomvideo data sample output=$(FIGURES) seed=21 num_train=1200 num_heldout=0 samples_per_group=1 real=false \
	  'task_weights={t2i: 0, t2v: 0, mi2v: 0, image_edit: 0.4, video_edit: 0.45, ref_edit: 0.15}' \
	  'from_words={t2i: 0, t2v: 0}' 'edit_weights={recolour: 0.7, background: 0.2, pattern: 0.1}'
	$(BIN)/loomvideo data prepare preset=$(PRESET) input=$(FIGURES)/samples.jsonl output=$(FIGURE_SHARDS)

# $(1) the job, $(2) the targets that make its shards, $(3) their folders. What ARGS says is checked before anything is made.
define TRAIN
@$(if $(strip $(ARGS)),$(BIN)/loomvideo $(1) preset=$(PRESET) data.shards=[$(3)] $(ARGS) --dry-run >/dev/null)
@$(MAKE) --no-print-directory $(2)
$(BIN)/loomvideo $(1) preset=$(PRESET) data.shards=[$(3)] evaluation.samples=$(DATA)/samples.jsonl $(if $(RUN),run=$(RUN)) $(ARGS)
endef

pretrain: $(VENV)/.setup ## train on all tasks: PRESET= RUN= ARGS="section.key=value …"
	$(call TRAIN,pretrain,shards,$(SHARDS))

finetune-edit: $(VENV)/.setup ## continue the newest (or ARGS="from_run=…") pretrain run on the editing tasks
	$(call TRAIN,finetune-edit,shards,$(SHARDS))

distill: $(VENV)/.setup ## make a model of few steps from the newest (or ARGS="from_run=…") finetune-edit run
	$(call TRAIN,distill,shards,$(SHARDS))

prefer: $(VENV)/.setup ## tune the newest (or ARGS="from_run=…") finetune-edit run by preferences, with more figures (FIGURE_SHARDS= for SHARDS alone): ARGS="prefer.method=nft …"
	$(call TRAIN,prefer,shards $(if $(FIGURE_SHARDS),figure-shards),$(SHARDS)$(if $(FIGURE_SHARDS),$(COMMA)$(FIGURE_SHARDS)))

evaluate: sample-data ## measure a checkpoint: CHECKPOINT= (newest run) SUITES=sample,fashion RUN= ARGS="judge.kind=…"
	$(BIN)/loomvideo evaluate preset=$(PRESET) 'suites=[$(SUITES)]' $(if $(CHECKPOINT),checkpoint=$(CHECKPOINT)) data.sample=$(DATA) data.fashion=$(DATA) $(if $(RUN),run=$(RUN)) $(ARGS)

serve: $(VENV)/.setup ## open the newest checkpoint as a web page on http://localhost:8000 (ARGS="checkpoint=… port=…")
	$(BIN)/loomvideo serve preset=$(PRESET) $(ARGS)

readme-strip: ## put the newest finetune-edit run's strip of edits into README.md
	$(BIN)/python benchmarks/readme_strip.py $(ARGS)

codec: sample-data ## train the codec of the tiny model anew (half an hour on one core) and write its weights
	$(BIN)/python benchmarks/tiny_codec.py $(DATA) $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/tiny_scene.py)

demo: sample-data ## the page of the newest checkpoint with examples to click, on http://localhost:8000
	@echo "when it says serving, open http://localhost:8000, click an example and then Generate"
	$(BIN)/loomvideo serve preset=$(PRESET) examples=$(DATA)/samples.jsonl $(ARGS)

mlflow: $(VENV)/.setup ## open the MLflow pages of the local runs on http://localhost:5000
	@echo "open http://localhost:5000/#/experiments?workflowType=machine_learning"
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --port 5000

clean: ## remove build products and caches (never data or runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

CLUSTER ?=
JOB ?= pretrain
IMAGE ?= cpu
BUILDER ?= docker

render: $(VENV)/.setup ## write the manifests of CLUSTER= (and a RayJob: JOB= RUN=) as a Kustomize folder
	$(BIN)/loomvideo render --cluster $(CLUSTER) $(if $(RUN),--job $(JOB) --run $(RUN)) -- $(ARGS)

submit: $(VENV)/.setup ## run JOB= on a cluster: CLUSTER= RUN= ARGS="section.key=value …" (DRY_RUN=1 only prints)
	$(BIN)/loomvideo submit $(JOB) --cluster $(CLUSTER) --run $(RUN) $(if $(DRY_RUN),--dry-run) -- $(ARGS)

validate: $(VENV)/.setup-dev ## check all profiles' manifests, images and scripts without a cluster
	$(BIN)/loomvideo validate $(if $(CLUSTER),--cluster $(CLUSTER))

doctor: $(VENV)/.setup ## check this machine, or every node of a cluster: CLUSTER= RUN=
	$(BIN)/loomvideo $(if $(CLUSTER),submit doctor --cluster $(CLUSTER) --run $(or $(RUN),check) --again,doctor)

mlflow-server: $(VENV)/.setup-server ## an MLflow server with a user: PORT= ARGS=, Postgres by MLFLOW_BACKEND_STORE_URI
	$(BIN)/loomvideo mlflow-server --port $(or $(PORT),5000) $(ARGS)

rehearse: $(VENV)/.setup-dev sample-data ## run every job on a cluster of several nodes on this machine (as root: own networks)
	$(MAKE) drill ARGS="--only jobs $(ARGS)"

rehearse-fresh: ## a minimal Debian in a folder, then make pretrain and the quick tests in it (root): SUITE= FOLDER= STEPS= MINUTES= PACKAGES= ARGS=
	SUITE="$(SUITE)" FOLDER="$(FOLDER)" STEPS="$(STEPS)" MINUTES="$(MINUTES)" PACKAGES="$(PACKAGES)" ARGS="$(ARGS)" infra/setup/rehearse_fresh.sh

drill: $(VENV)/.setup-dev $(VENV)/.setup-server sample-data ## the jobs and the failures of that cluster, one after another: ARGS="--only head,worker"
	$(BIN)/python infra/drills/drill.py --folder $(or $(DRILL),runs/drill-$$(date +%Y%m%d-%H%M%S)) --sample $(DATA) $(ARGS)

drill-training: $(VENV)/.setup-dev shards ## rehearse what training must survive, with the tiny preset: ARGS="--only worker,disk"
	$(BIN)/python infra/drills/training_drill.py --folder $(or $(DRILL),runs/drill-training-$$(date +%Y%m%d-%H%M%S)) --shards $(SHARDS) $(ARGS)

image: ## build a container image: IMAGE=cpu, cuda or mlflow, BUILDER=docker, podman or buildah, ARGS="--build-arg …"
	$(BUILDER) build $(ARGS) --file infra/images/Dockerfile.$(IMAGE) --tag loomvideo/$(IMAGE):$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) .

kernels: $(VENV)/.setup ## compile the kernels for this machine (or an image: ARGS="architectures=[80,90,100,120]")
	$(BIN)/loomvideo kernels build $(ARGS)

bench: bench-model bench-kernels bench-data bench-training bench-generation ## every benchmark, one after the other (use a quiet machine)

bench-training: shards ## the loop against a plain one, packing, pre-encoded against encoding in the loop
	$(BIN)/python benchmarks/training_loop.py $(ARGS)
	$(BIN)/python benchmarks/training_loop.py --model small --steps 5 --tokens 256
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/encode_in_loop.py $(DATA)/samples.jsonl $(SHARDS)

bench-data: sample-data ## the data path against plain loops and other writers, the driver by size: ARGS=--parts …
	$(BIN)/python benchmarks/data_bench.py $(DATA)/samples.jsonl $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/driver_scale.py)
	$(if $(ARGS),,$(BIN)/python benchmarks/driver_scale.py --membership 300000)

bench-prepare: $(VENV)/.setup ## how busy encoders are on 8 and 64 logical GPUs, decoding and encoding asleep: ARGS=--gpus 8 --kill 90
	$(BIN)/python benchmarks/rehearse_prepare.py $(ARGS)

bench-cluster: $(VENV)/.setup ## shards, builders and dying nodes against the driver's memory and CPU, on nodes of Ray's own: ARGS=
	$(BIN)/python benchmarks/cluster_scale.py --nodes 0 --shards 1000 5000 20000 $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/cluster_scale.py --shards 480 --builders 4 16 48 --nodes 4 --sleep 15)
	$(if $(ARGS),,$(BIN)/python benchmarks/cluster_scale.py --shards 1200 --builders 20 --nodes 20 --sleep 4 --loss 0.05)

bench-kernels: $(VENV)/.setup ## time every kernel against eager and torch.compile: ARGS=--no-compile
	$(BIN)/python benchmarks/kernels_cpu.py $(ARGS)

bench-model: $(VENV)/.setup-dev ## a mixed pack through the transformer against a dense implementation: time, peak memory
	$(BIN)/python benchmarks/model_pack.py $(ARGS)

bench-gpu: ## one GPU, nine minutes, torch and Triton alone (encoders: diffusers, transformers): kernels, encoders, 5B steps, memory against the plan
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) benchmarks/gpu.py --write-docs $(ARGS)

bench-generation: $(VENV)/.setup ## denoising steps a second by task against a plain loop, shortcuts, memory; Scale-and-Add against concatenation
	$(BIN)/python benchmarks/generation.py $(ARGS)
	$(BIN)/python benchmarks/generation_memory.py
	$(BIN)/python benchmarks/scale_and_add.py
