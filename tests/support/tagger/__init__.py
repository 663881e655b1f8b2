"""A pack of nodes as others have them: one makes a text of an image, one a text of a text."""

import gc

gc.collect()
gc.freeze()  # what is imported by now stays, and the collections that ComfyUI asks for after prompts are short


class Tagger:
    """IMAGE → STRING: the image's size, and how bright it is."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "tag"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "threshold": ("FLOAT", {"default": 0.5}), "kind": (["a", "b"],)}}

    def tag(self, image, threshold, kind):
        _, height, width, _ = image.shape
        if width == 13:
            raise ValueError("thirteen pixels are too few")
        return (f"{'bright' if image.mean() > threshold else 'dark'},\n{width} by {height}",)


class Shorter:
    """STRING → STRING: the first word, which needs a text of another node."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "cut"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def cut(self, text):
        return (text.split(",")[0],)


NODE_CLASS_MAPPINGS = {"TestTagger": Tagger, "TestShorter": Shorter}
NODE_DISPLAY_NAME_MAPPINGS = {"TestTagger": "Tagger of the tests"}
