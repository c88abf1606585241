"""How a saved model is opened: the lines of Python in its card."""

import json

import transformers

from grape_hf.reports.run_records import RunRecord, task_of

_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
_VARIABLES = {
    "AutoTokenizer": "tokenizer",
    "AutoImageProcessor": "image_processor",
    "AutoFeatureExtractor": "feature_extractor",
    "AutoProcessor": "processor",
}


def loading(record: RunRecord) -> tuple[str, str]:
    """Say how the model is opened.

    Returns:
        The Python lines, empty if transformers does not know the class; and a sentence to go with them.
    """
    if not hasattr(transformers, record.architecture):
        return "", ""
    own = task_of(record.architecture)
    kinds = {"model": _AUTO_CLASSES.get(own or "", record.architecture)}
    if record.preprocessor:
        kinds[_VARIABLES[record.preprocessor]] = record.preprocessor
    elif record.config.get("model_type") == "timm_wrapper":
        kinds["image_processor"] = "AutoImageProcessor"  # made from the configuration alone
    name = record.args.hub_model_id or record.card.data.get("model_name") or "path/to/the/model"
    repository = json.dumps(str(name), ensure_ascii=False)
    needs = "transformers and peft" if record.adapter else "transformers alone"
    note, first = f"With {needs}; the name is that of a folder or of the repository on the Hub:", []
    if record.config.get("model_type") == "timm_wrapper":
        from grape_hf.vision import loading_note  # needs timm, as the model does

        if ours := loading_note(record.config["architecture"]):
            note, first = ours, ["import grape_hf.vision", ""]
    lines = [f"from transformers import {', '.join(sorted(kinds.values()))}", ""]
    calls = [f"{variable} = {kind}.from_pretrained({repository})" for variable, kind in kinds.items()]
    return "\n".join([*first, *lines, *calls]), note
