"""Export what a finetuning run has trained to what serves it.

python scripts/export.py --method_dir out/lora --to gguf --out_dir out/gguf
python scripts/export.py --method_dir out/lora --to peft --out_dir out/peft

hf         the merged network, a Hugging Face folder: vLLM, transformers, mlx-lm
gguf       the merged network in one file: llama.cpp, Ollama, LM Studio
gguf-lora  the LoRA alone, for llama.cpp beside a GGUF file of the base
peft       the method alone, a PEFT folder: transformers + peft, vLLM (a LoRA)
mlx        the LoRA alone, for mlx-lm
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_model.cli import cli
from lit_model.load import method_dirs, read_method
from lit_model.merge import Merged, merge
from lit_model.weights import demo
from lit_model.weights.folder import Folder
from lit_model.weights.peft import write_mlx, write_peft
from lit_model.weights.to_gguf import write_gguf, write_gguf_lora


@dataclass
class Options:
    to: Literal["hf", "gguf", "gguf-lora", "peft", "mlx"]
    """the format, see above"""
    out_dir: Path
    """folder for what is written"""
    method_dir: Path | None = None
    """out_dir of the finetuning run, or a PEFT folder; several with commas between them act together; null: the base
    itself, for gguf"""
    checkpoint_dir: Path = demo.DEMO_CHECKPOINT
    """Hugging Face folder of the base network that it was trained on"""
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] = "Q8_0"
    """how a GGUF file stores matrices"""
    peft_exact: bool = False
    """keep DoRA, rslora and alpha as PEFT reads them; false: one plain LoRA that vLLM reads right, too"""


def main(options: Options) -> None:
    base_dir, method_dir, out_dir = options.checkpoint_dir, options.method_dir, options.out_dir
    base, quoted, out = Folder(base_dir), shlex.quote(str(base_dir)), shlex.quote(str(out_dir))
    if options.to == "gguf":
        file = out_dir / f"{base_dir.name}-{options.gguf_type}.gguf"
        merged = Merged(base_dir, method_dir, as_a_whole=True)
        out_dir.mkdir(parents=True, exist_ok=True)
        loss = write_gguf(file, merged, options.gguf_type)
        if method_dir is not None:
            print(f"storing the sum in {options.gguf_type} {loss}")
        print(f"serve it with: llama-server -m {shlex.quote(str(file))}")
        return
    if method_dir is None:
        raise ValueError(f"--to {options.to} wants a --method_dir")
    if options.to == "hf":
        merge(base_dir, method_dir, out_dir)
        print(f"serve it with: vllm serve {out}")
        return
    methods = [read_method(folder, base) for folder in method_dirs(method_dir)]
    if options.to == "peft":
        write_peft(out_dir, methods, base, options.peft_exact)
        if methods[0][0]["method"] == "lora":
            print(f"serve it with: vllm serve {quoted} --enable-lora --lora-modules tuned={out}")
        network = f"AutoModelForCausalLM.from_pretrained({str(base_dir)!r})"
        print(f"in Python: peft.PeftModel.from_pretrained({network}, {str(out_dir)!r})")
    elif options.to == "gguf-lora":
        write_gguf_lora(out_dir / "lora.gguf", methods, base)
        print(f"serve it with: llama-server -m BASE.gguf --lora {out}/lora.gguf")
    else:
        write_mlx(out_dir, methods, base)
        print(f"serve it with: mlx_lm.server --model {quoted} --adapter-path {out}")


if __name__ == "__main__":
    cli(main, Options, __doc__)
