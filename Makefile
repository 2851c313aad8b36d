# make demo, make test: nothing but Python 3.11+ and make is needed beforehand; both share one environment.
PYTHON ?= python3
PIP_FLAGS ?=
# PyPI's torch is the CUDA build, with gigabytes of libraries. Where this cannot be reached, pip's own index is used.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
MODEL := demo/tiny-stable-diffusion
OUT := demo/output
MIN_PSNR := 45# dB, mean of the demo's 8 pairs, which has been 51; below, make demo fails
CAPTIONS := "a photo of an astronaut riding a horse on mars" \
	"The Milky Way lies in the sky, with the golden snow mountain lies below, high definition"

.PHONY: demo test test-full clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	-$(BIN)/pip install $(PIP_FLAGS) --retries 0 --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install $(PIP_FLAGS) -r requirements.txt
	touch $@

# The original README's three commands, on the bundled model; then how close int8 is to fp32.
demo: .venv/installed
	rm -rf $(OUT)
	$(BIN)/python demo/scenes.py --output_dir demo/scenes --count 400
	$(BIN)/python create_metadata.py --image_path demo/scenes
	$(BIN)/accelerate launch train_text_to_image_qat.py \
		--pretrained_model_name_or_path $(MODEL) \
		--train_data_dir demo/scenes \
		--use_ema --resolution=64 --center_crop --random_flip \
		--train_batch_size=4 --gradient_accumulation_steps=1 \
		--gradient_checkpointing --max_train_steps=300 \
		--learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler="constant" \
		--lr_warmup_steps=0 --output_dir="$(OUT)/sdv1-5-qat_kd" --use_cpu
	$(BIN)/python text2images.py -m $(MODEL) -c $(CAPTIONS) -n 4 --batch_size 4 --output_dir $(OUT)/fp32
	$(BIN)/python text2images.py -m $(MODEL) -qm $(OUT)/sdv1-5-qat_kd/quant_model.pt -c $(CAPTIONS) -n 4 --batch_size 4 \
		--output_dir $(OUT)/int8
	$(BIN)/python evaluate.py $(OUT)/fp32 $(OUT)/int8 --output_dir $(OUT) --min_psnr $(MIN_PSNR)
	@echo "How training went: $(OUT)/sdv1-5-qat_kd/training.png"
	@echo "Every pair, to be flipped through in a browser: $(OUT)/report.html"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# Killed runs, several machines, ten minutes of damaged and hostile quant_model.pt files; and, in 24 GB of memory and
# 10 GB of disk, a random-weight SD v1.5 through all three scripts, and SDXL through calibration and one denoising step.
test-full: .venv/installed
	$(BIN)/python -m pytest -m full -s tests

clean:
	rm -rf .venv demo/scenes $(OUT)
