r"""Train a language model with GrAPE on WikiText-103, or on text of yours: the main job.

    accelerate launch recipes/wikitext103.py recipes/wikitext103.yaml           # WikiText-103, recommended settings
    accelerate launch recipes/wikitext103.py recipes/wikitext103_paper.yaml     # the paper's settings
    accelerate launch recipes/wikitext103.py --train_file my.txt --output_dir outputs/mine --max_steps 2000
    accelerate launch recipes/wikitext103.py --train_file my.txt --output_dir outputs/adapter \
        --model_name_or_path openai-community/gpt2 --use_peft --lora_r 16 --lora_target_modules c_attn

Two minutes on two CPU cores, without a network (a small text that comes with Python; its figures compare with nothing):

    OMP_NUM_THREADS=2 accelerate launch recipes/wikitext103.py recipes/demo.yaml --output_dir outputs/small

Every option can stand on the command line or in a YAML or JSON file given first; the command line wins. ``--method bp``
and ``--method dfa`` train the baselines, all else equal. Text comes from ``--train_file``, or from ``--dataset_name``
on the Hub, by default WikiText-103; when no data is named and the Hub is out of reach, from a small embedded text, and
the metrics and the model card say so.

Expected: perplexity and cost stand at the head of each YAML. The output folder ends up with the model and its
tokenizer, which plain ``transformers`` opens, ``all_results.json``, ``sample.txt``, ``alignment.json``,
``alignment.png``, ``curves.png`` and the model card; ``--push_to_hub --hub_model_id you/name`` uploads it at every save
and at the end. With ``--use_peft`` it is an adapter that is trained and left there. On a CPU, ``accelerate launch``
uses one core for each process unless told otherwise, as above.

The code is ``grape_hf/recipes/wikitext103.py``: as a part of the package, ``grape-hf train`` has it too.
"""

import sys

from grape_hf.recipes.wikitext103 import main

if __name__ == "__main__":
    main(sys.argv[1:])
