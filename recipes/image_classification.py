r"""Train an image classifier with GrAPE, or with backpropagation and other baselines: the rows of the paper's tables.

    accelerate launch recipes/image_classification.py recipes/image_classification/cifar100_resnet20.yaml
    accelerate launch recipes/image_classification.py recipes/image_classification/mnist_cnn.yaml --method bp
    accelerate launch recipes/image_classification.py --architecture resnet18 --data_dir my/images --output_dir out

Half a minute on one CPU core, without a network (scikit-learn's digits; its figures compare with nothing published):

    OMP_NUM_THREADS=1 python recipes/image_classification.py recipes/image_classification/digits.yaml

Every option can stand on the command line or in a YAML or JSON file given first; the command line wins. The model is
any timm architecture, or with ``--model_name_or_path`` any image classifier of transformers. Images come from
``--data_dir``, or from ``--dataset_name`` on the Hub, by default CIFAR-100; when no data is named and the Hub is out of
reach, from the digits, and the metrics and the model card say so. Choices are made on a validation split cut off the
training images; the test split is read with ``--evaluate_test`` only.

Expected: accuracy and cost stand at the head of each YAML. The output folder ends up with the model and its image
processor, which ``pipeline("image-classification")`` opens (this package's own networks after
``import grape_hf.vision``), ``all_results.json``, ``alignment.json``, ``alignment.png``, ``curves.png`` and the model
card. ``--push_to_hub --hub_model_id you/name`` uploads it at the end, and at every save.

The code is ``grape_hf/recipes/image_classification.py``: as a part of the package, ``grape-hf train`` has it too.
"""

import sys

from grape_hf.recipes.image_classification import main

if __name__ == "__main__":
    main(sys.argv[1:])
