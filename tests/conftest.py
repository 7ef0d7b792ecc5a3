"""Which tests run behind ``make test-all`` only: they are long, the rest is ``make test``.

Long by themselves (``LONG``, ``LONG_CASES``), or by their number: of a test with many cases
``make test`` runs a sample, always the same.
"""

from __future__ import annotations

import collections
import re
import zlib

import pytest

# Every operator of torch's own database; random models; scripts that train;
# planted regressions.
LONG = ("test_rules_opinfo.py", "test_random_models.py", "test_scripts.py", "test_demo.py",
        "test_reproduce.py", "test_perf_gate.py")  # fmt: skip

# Long tests, and of tests with many cases the long ones whose like stays: a pattern of their ids.
LONG_CASES = {
    "test_without_gradients": ".*",
    "test_what_inductor_makes_for_cuda_computes_the_same": ".*",
    "test_resuming_is_bit_exact": "2",
    "test_recurrent_layers_say_why_each_length_is_captured": ".*",
    "test_numbers_that_a_forward_reads_are_read_again": "_Config",
    "test_generate_and_model_outputs": "False",
    "test_failures_are_named_on_every_living_rank": ".*",
    "test_every_kind_of_map_stands_for_the_full_one": "",
    "test_checkpoints_resume_the_learning_state": "True",
    "test_a_copy_is_a_plain_model": "pickle",
    "test_a_number_that_never_rests_is_named_once": "",
    "test_a_part_equals_the_gradient_of_a_mixed_cotangent": "(?!mlp|cnn).*",
    "test_a_seed_repeats_a_run_and_a_resumed_run_continues_it": (
        "bp|fa|usf|brsf|frsf|drtp|dkp|fg-a|lg-fg-a|grape-2024"
    ),
    "test_a_seed_reproduces_a_run": "",
    "test_auto_takes_the_finest_that_fits": "",
    "test_autocast_bf16": "encoder-prenorm-dfa|mlp-bp",
    "test_averaged_weights": "False",
    "test_batched_updates_are_the_same": "macro-.*|micro-.*|resnet-dfa",
    "test_cached_traces_give_the_same_graphs": "dfa|fdfa",
    "test_calibration_steps_follow_eager": "",
    "test_changes_between_steps": "bp",
    "test_cnn_runs_the_whole_zoo_of_changes_in_feedback_mode": "",
    "test_compiled_steps_are_compared": "",
    "test_copies_go_their_own_way": "pickle",
    "test_cosine_against_batch_and_depth": "8-.*",
    "test_every_method_learns_with_every_kind": "(fdfa|dkp|grape-2024)-.*",
    "test_depth_costs_cosine_and_iterations_bring_it_back": "",
    "test_every_form_gives_the_same": "options0",
    "test_exact_steps_equal_eager": "(?!mlp).*-bp|(gru|encoder-prenorm|unused|stop|inplace)-grape",
    "test_feedback_steps_are_those_of_a_fresh_net": "padded-grape|causal-.*",
    "test_forward_and_update_share_a_mask": "(bp|grape)-None",
    "test_full_batch_equals_forward_ad": "encoder-causal|encoder-sequence-first|gru",
    "test_gradients_of_compiled_pools": ".*",
    "test_in_a_process_of_its_own": "",
    "test_inductor_at_any_batch_size": ".*",
    "test_inductor_computes_what_the_graphs_say": "(?!cnn-1.0).*",
    "test_learns": "",
    "test_loss_inside_the_model": "bp|dfa",
    "test_mixed_models_survive": "inplace|encoder|residual",
    "test_moved_bytes": "",
    "test_no_compiled_call_has_a_bias": "False",
    "test_no_update_depends_on_another_layer": "gru|stop",
    "test_points_by_name_glob_class_and_function": "blocks.*|points1-.*",
    "test_only_the_option_makes_a_chain_and_the_verifier_knows": "(?!mlp|residual).*",
    "test_refit_variants": "",
    "test_resume_is_bit_exact": "mlp-grape-.*",
    "test_runs_on": ".*-(residual|tied)",
    "test_smoke_goes_through_everything_and_goes_on": "",
    "test_split_pair_equals_the_joint_graph_bit_for_bit": "encoder-.*|inplace-.*",
    "test_stages_are_the_whole_step_bit_for_bit": "(lstm|gru|encoder.*|stop|vgg|inplace|cnn)-.*",
    "test_stages_equal_the_whole_batch": ".*-[14]-2-.*",
    "test_no_work_is_done_twice": "(lstm|gru|encoder.*|stop|vgg|inplace|cnn|mlp|unused)-.*",
    "test_compiled_stages": "bp-.*|grape-calibration",
    "test_steps_are_those_of_the_wrapper": ".*-lstm|bp-.*|dfa-cnn",
    "test_sub_batch_equals_its_rows_of_the_full_batch": "1-.*",
    "test_the_gradient_passes_the_activation_before_it_spreads": "sigmoid|tanh",
    "test_the_loss_falls_on_digits": "fa|usf|brsf|frsf",
    "test_tiled_pools": "bp-.*",
    "test_training_equals_one_process": "4",
    "test_training_is_the_same": "streams",
    "test_with_every_method_and_other_options": ".*-(fdfa|grape)",
    "test_what_is_switched_off_is_otherwise_run": "",
}


# Folders whose tests compile or trace something (staleness and fuzz sample by themselves). Of a
# test with more than MANY cases there one of SAMPLE runs, those whose names come first by a hash.
SAMPLED = ("methods", "passes", "runtime", "stages", "integration")
MANY = 4
SAMPLE = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--accept``: golden files are written anew instead of compared."""
    parser.addoption("--accept", action="store_true", help="write golden files anew")


# The names of ``LONG_CASES`` that were collected, and of these the ones whose pattern fits a case.
COLLECTED = pytest.StashKey[set[str]]()
FITTING = pytest.StashKey[set[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is long as slow, and all but a sample of many cases."""
    collected = config.stash.setdefault(COLLECTED, set())
    fitting = config.stash.setdefault(FITTING, set())
    short: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        name = getattr(item, "originalname", "")
        long = item.path.name in LONG
        if name in LONG_CASES:
            collected.add(name)
            case = getattr(item, "callspec", None)
            if re.fullmatch(LONG_CASES[name], case.id if case else ""):
                fitting.add(name)
                long = True
        if long:
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("slow") is None and item.path.parent.name in SAMPLED:
            short[item.nodeid.partition("[")[0]].append(item)
    for cases in short.values():
        cases.sort(key=lambda item: zlib.crc32(item.name.encode()))
        kept = -(-len(cases) // SAMPLE) if len(cases) > MANY else len(cases)
        for item in cases[kept:]:
            item.add_marker(pytest.mark.slow)
