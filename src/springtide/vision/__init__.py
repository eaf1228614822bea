"""Vision: DependencyViT, and images and scenes to train it on.

Once it is imported, transformers' Auto classes and pipelines take folders of these models.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from springtide.vision.dependency_vit import (
    DependencyViTConfig,
    DependencyViTForImageClassification,
    DependencyViTForMaskedImageModeling,
    DependencyViTModel,
)
from springtide.vision.images import DependencyViTImageProcessor

AutoConfig.register(DependencyViTConfig.model_type, DependencyViTConfig)
AutoModel.register(DependencyViTConfig, DependencyViTModel)
AutoModelForImageClassification.register(DependencyViTConfig, DependencyViTForImageClassification)
AutoModelForMaskedImageModeling.register(DependencyViTConfig, DependencyViTForMaskedImageModeling)
AutoImageProcessor.register(DependencyViTConfig, slow_image_processor_class=DependencyViTImageProcessor)
