"""What this package relies on in TRL and transformers that is not public; as test_contracts.py says."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from tests.signatures import parameters, source

# ---------------------------------------------------------------- TRL 1.16.0: training/trl_trainer.py


class TestTrlTrainer:
    """`DPOTrainer`, of which GridTrainer is a subclass."""

    @pytest.fixture(scope="class")
    def trainer(self) -> Any:
        from trl import DPOTrainer

        return DPOTrainer

    def test_prepare_dataset_takes_these_arguments_and_its_result_is_the_dataset(self, trainer: Any) -> None:
        assert parameters(trainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]
        assert "train_dataset = self._prepare_dataset(" in source(trainer.__init__)

    def test_precompute_ref_logps_takes_these_arguments(self, trainer: Any) -> None:
        assert parameters(trainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]

    def test_the_constructor_reads_precompute_ref_log_probs_and_sets_precompute_ref_logps(self, trainer: Any) -> None:
        assert "args.precompute_ref_log_probs" in source(trainer.__init__)
        assert "self.precompute_ref_logps = " in source(trainer.__init__)

    def test_the_constructor_reads_router_aux_loss_coef(self, trainer: Any) -> None:
        assert "args.router_aux_loss_coef" in source(trainer.__init__)

    def test_compute_loss_takes_model_and_inputs_and_computes_the_loss_in__compute_loss(self, trainer: Any) -> None:
        expected = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
        assert parameters(trainer.compute_loss) == expected
        assert parameters(trainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]

    def test__compute_loss_calls_the_model_once_with_fused_lm_head(self, trainer: Any) -> None:
        assert (
            source(trainer._compute_loss).count("outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)")
            == 1
        )

    @pytest.mark.parametrize("name", ["completion_mask", "ref_chosen_logps", "ref_rejected_logps", "attention_mask"])
    def test__compute_loss_reads_this_from_the_batch(self, trainer: Any, name: str) -> None:
        assert f'inputs["{name}"]' in source(trainer._compute_loss)

    @pytest.mark.parametrize("name", ["log_probs", "entropy", "mean_logits", "is_top1"])
    def test__compute_loss_reads_this_from_the_models_output(self, trainer: Any, name: str) -> None:
        assert f"outputs.{name}[:, -seq_len:]" in source(trainer._compute_loss)

    def test__compute_loss_reads_the_reference_from_the_batch_if_precompute_ref_logps(self, trainer: Any) -> None:
        assert "if self.precompute_ref_logps: ref_chosen_logps" in source(trainer._compute_loss)

    def test__compute_loss_weighs_each_loss_type_by_loss_weights_and_means_over_pairs(self, trainer: Any) -> None:
        text = source(trainer._compute_loss)
        assert "for loss_type, loss_weight in zip(self.loss_types, self.loss_weights, strict=True):" in text
        assert "loss += per_sequence_loss.mean() * loss_weight" in text

    def test__compute_loss_means_sft_over_the_chosen_tokens(self, trainer: Any) -> None:
        assert "batch_loss = -chosen_per_token_logps[chosen_mask.bool()].mean()" in source(trainer._compute_loss)

    def test__compute_loss_uses_of_the_accelerator_what__Alone_has(self, trainer: Any) -> None:
        from cpt_ray.training.trl_trainer import _LocalAccelerator

        used = set(re.findall(r"self\.accelerator\.(\w+)", source(trainer._compute_loss)))
        assert used - {"unwrap_model"} == {
            "device",
            "gather",
            "gather_for_metrics",
        }  # unwrap_model: of a reference model
        assert hasattr(_LocalAccelerator, "gather")
        assert hasattr(_LocalAccelerator, "gather_for_metrics")

    def test__compute_loss_writes_only_metrics_and_the_number_of_tokens_to_the_trainer(self, trainer: Any) -> None:
        written = re.findall(r"self\.(\w+)(?:\[[^=]*\])* \+?= ", source(trainer._compute_loss))
        assert set(written) == {"_metrics", "_total_train_tokens"}

    def test__compute_loss_logs_these_metrics_that_need_more_than_log_probs(self, trainer: Any) -> None:
        from cpt_ray.training.trl_trainer import UNMEASURED

        assert [name for name in UNMEASURED if f'["{name}"].append' not in source(trainer._compute_loss)] == []

    def test_log_averages_and_clears__metrics_of_the_mode(self, trainer: Any) -> None:
        text = source(trainer.log)
        assert "for key, val in self._metrics[mode].items()" in text
        assert "self._metrics[mode].clear()" in text


# ---------------------------------------------------------------- TRL 1.16.0: logprobs/model.py


def test_add_fused_lm_head_takes_a_model_and_computes_log_probs_alone_unless_given_outputs() -> None:
    from trl.trainer.utils import add_fused_lm_head

    assert inspect.signature(add_fused_lm_head).parameters["outputs"].default == ("log_probs",)


def test_the_forward_of_add_fused_lm_head_takes_fused_lm_head_and_shift_labels() -> None:
    from trl.trainer.utils import add_fused_lm_head

    text = source(add_fused_lm_head)
    assert "fused_lm_head=False, labels=None, shift_labels=None," in text
    assert "if shift_labels is not None: kwargs" in text  # so that None may be given
    assert "labels = shift_labels" in text  # scored without shifting


def test_the_scales_that_add_fused_lm_head_reads_from_a_config_are_known() -> None:
    from trl.trainer.utils import add_fused_lm_head

    from cpt_ray.logprobs.model import LOGIT_SCALES

    read = set(re.findall(r'getattr\(text_config, "(\w+)"', source(add_fused_lm_head)))
    assert read - {"output_router_logits", "router_aux_loss_coef"} == set(LOGIT_SCALES)


def test_fused_causal_lm_output_has_log_probs() -> None:
    from trl.trainer.utils import FusedCausalLMOutput

    assert "log_probs" in parameters(FusedCausalLMOutput)


def test_create_model_from_path_is_what_the_trainer_loads_its_model_by() -> None:
    from trl import DPOTrainer
    from trl.trainer.utils import create_model_from_path

    assert parameters(create_model_from_path) == ["model_id", "architecture", "kwargs"]
    assert "create_model_from_path(" in source(DPOTrainer.__init__)


# ---------------------------------------------------------------- transformers 5.19: training/trl_trainer.py


class TestTransformersTrainer:
    """`Trainer`, whose methods GridTrainer overrides."""

    @pytest.fixture(scope="class")
    def trainer(self) -> Any:
        from transformers import Trainer

        return Trainer

    def test__get_num_items_in_batch_is_handed_on_to_compute_loss(self, trainer: Any) -> None:
        assert parameters(trainer._get_num_items_in_batch) == ["self", "batch_samples", "device"]
        assert "num_items_in_batch = self._get_num_items_in_batch(batch_samples, device)" in source(
            trainer.get_batch_samples
        )

    def test_loss_is_scaled_for_ga_keeps_the_loss_from_being_divided_again(self, trainer: Any) -> None:
        assert trainer.loss_is_scaled_for_ga is None
        assert "if self.loss_is_scaled_for_ga is not None:" in source(trainer.training_step)

    def test__save_takes_a_folder_and_weights_by_name(self, trainer: Any) -> None:
        assert parameters(trainer._save) == ["self", "output_dir", "state_dict"]
        assert "self.model.save_pretrained(output_dir, state_dict=state_dict)" in source(trainer._save)

    def test__prepare_inputs_and_compute_loss_context_manager_take_a_batch_and_nothing(self, trainer: Any) -> None:
        assert parameters(trainer._prepare_inputs) == ["self", "inputs"]
        assert parameters(trainer.compute_loss_context_manager) == ["self"]

    def test_create_scheduler_takes_steps_and_optimizer_and_sets_lr_scheduler(self, trainer: Any) -> None:
        assert parameters(trainer.create_scheduler) == ["self", "num_training_steps", "optimizer"]
        assert "self.lr_scheduler = " in source(trainer.create_scheduler)

    def test_save_only_model_is_what_a_sharded_model_is_checked_for(self, trainer: Any) -> None:
        assert "is_distributed_loading_by_transformers" in source(trainer.__init__)
        assert "not args.save_only_model" in source(trainer.__init__)
        assert "if not self.args.save_only_model:" in source(trainer._save_checkpoint)

    def test_a_checkpoint_has_trainer_state_json_with_these_fields(self) -> None:
        """Used by training/worker.py."""
        from transformers import TrainerState
        from transformers.trainer import TRAINER_STATE_NAME

        assert TRAINER_STATE_NAME == "trainer_state.json"
        assert {"global_step", "max_steps", "log_history"} <= {*parameters(TrainerState)}


# ---------------------------------------------------------------- transformers 5.19: logprobs/grid.py


def test_sdpa_attention_forward_and_repeat_kv_take_these_arguments() -> None:
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    assert parameters(sdpa_attention_forward)[:5] == ["module", "query", "key", "value", "attention_mask"]
    assert parameters(repeat_kv) == ["hidden_states", "n_rep"]


def test_a_mask_of_four_dimensions_is_taken_as_it_is() -> None:
    from transformers import masking_utils

    assert "len(attention_mask.shape) == 4" in source(masking_utils._preprocess_mask_arguments)


def test_layers_hand_further_arguments_of_the_models_call_on_to_their_attention() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

    assert "**kwargs" in source(Qwen3DecoderLayer.forward)
    assert "**kwargs, )" in source(Qwen3Attention.forward)
