"""The policies that QVPO knows by name."""

import inspect

from helpers import SMALL_MODELS
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN

from sb3_qvpo import QVPO


def test_cnn_and_multi_input_policies_use_their_extractors():
    extractors = [type(SMALL_MODELS[kind]().actor.features_extractor) for kind in SMALL_MODELS]
    assert extractors == [FlattenExtractor, NatureCNN, CombinedExtractor]


def test_policies_take_their_arguments_in_sb3s_order():
    from stable_baselines3.td3 import policies as td3

    for name in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"):
        theirs, ours = (list(inspect.signature(cls).parameters) for cls in (getattr(td3, name), QVPO.policy_aliases[name]))
        assert ours[:6] == theirs[:6]
