"""What this package relies on in other libraries that is not public, and so may change in any release.

Each test names one thing (class, method, argument) and its section the file that uses it, so that an upgrade fails here
by name, before it fails somewhere else without one. Tests look at signatures and at the few lines of source that are
relied on; none starts an engine or a training, and one alone starts Ray, which gives the head its resource. When one
fails: read the new version's code, change the file that uses it, then the test and the pin in pyproject.toml. One
section per library and file.
"""

from __future__ import annotations

import inspect
import re

from tests.signatures import parameters, source

# ---------------------------------------------------------------- Ray 2.60: engines/ray_train.py


def test_a_worker_group_without_room_is_started_again_and_again_if_there_is_no_limit() -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import default

    assert "WorkerGroupStartupTimeoutError" in source(default)
    assert issubclass(WorkerGroupStartupTimeoutError, Exception)
    assert "controller_failure_limit != -1" in source(default.DefaultFailurePolicy)


def test_worker_group_and_controller_errors_have_their_causes() -> None:
    from ray.train import ControllerError, WorkerGroupError

    cause = ValueError("why")
    assert WorkerGroupError("text", {0: cause}).worker_failures == {0: cause}
    assert ControllerError(cause).controller_failure is cause


def test_worker_failures_are_the_workers_own_exceptions() -> None:
    from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus

    assert "error = error._base_exc" in source(WorkerGroupPollStatus)


def test_a_failed_health_check_has_health_check_failure() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    cause = ValueError("why")
    assert WorkerHealthCheckFailedError("text", cause).health_check_failure is cause


def test_the_preemption_watcher_asks_for_no_node_and_is_left_out_by_a_variable_of_the_driver() -> None:
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
    from ray.train.v2._internal.execution.controller.controller import TrainController

    from cpt_ray.engines.ray_train import WATCHER

    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == WATCHER
    assert WATCHER in constants.ENV_VARS_TO_PROPAGATE
    assert "ray_constants.env_bool( ENABLE_PREEMPTION_WATCHER_ENV_VAR," in source(TrainController.__init__)
    # once it asks for a node, it need not be left out
    text = source(PreemptionCallback.after_worker_group_start)
    assert "watcher_cls = ray.remote(num_cpus=0, max_restarts=-1)(PreemptionWatcher)" in text
    assert "watcher_cls.remote(" in text


# ---------------------------------------------------------------- Ray 2.60: engines/pool.py


def test_what_a_callback_raises_in_a_step_of_an_execution_ends_it_with_that_error() -> None:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    assert parameters(ExecutionCallback.on_execution_step) == ["self", "executor"]
    text = source(StreamingExecutor.run)
    assert "callback.on_execution_step(self)" in text
    assert "except Exception as e: # Propagate it to the result iterator. exc = e" in text
    assert "state.mark_finished(exc)" in text


def test_a_dataset_has_callbacks_and_no_bound_of_its_own_at_minus_one() -> None:
    import ray.data
    from ray.data._internal.execution.no_progress_guard import NoProgressGuard

    context = ray.data.DataContext()
    assert context.custom_execution_callback_classes == []
    assert context.execution_no_progress_timeout_s > 0
    assert context.wait_for_min_actors_s <= 0  # a pool works with those of its actors that are there
    assert "return self._timeout_s > 0" in source(NoProgressGuard)


def test_a_pool_of_a_fixed_size_asks_for_all_actors_at_its_start() -> None:
    from ray.data import ActorPoolStrategy
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    assert ActorPoolStrategy(size=4).initial_size == 4
    assert "delta=self._actor_pool.initial_size()" in source(ActorPoolMapOperator.start)


# ---------------------------------------------------------------- Ray 2.60: cluster.py, capacity.py


def test_ray_data_asks_for_no_nodes_while_utilization_is_below_these_thresholds() -> None:
    from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler

    from cpt_ray.cluster import ENGINE_ENV

    text = source(rate_based_cluster_autoscaler)
    names = {name for name in ENGINE_ENV if name.startswith("RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_")}
    assert set(re.findall(r'"(RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_\w+_UTIL_THRESHOLD)"', text)) == names
    assert "self._send_resource_request(self._last_resource_request)" in text


def test_the_key_value_store_takes_namespaces_and_removes_by_prefix() -> None:
    from ray.experimental import internal_kv

    assert parameters(internal_kv._internal_kv_put) == ["key", "value", "overwrite", "namespace"]
    assert parameters(internal_kv._internal_kv_get) == ["key", "namespace"]
    assert parameters(internal_kv._internal_kv_list) == ["prefix", "namespace"]
    assert parameters(internal_kv._internal_kv_del) == ["key", "del_by_prefix", "namespace"]


def test_an_autoscaler_is_started_with_the_clusters_address_and_its_configuration() -> None:
    from ray._private import services

    text = source(services.start_monitor)
    assert 'f"--gcs-address={gcs_address}"' in text
    assert '"--autoscaling-config=" + str(autoscaling_config)' in text
    assert "monitor.py" in inspect.getsource(services)


def test_autoscaler_v1_reports_what_it_launches_and_what_is_wanted() -> None:
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler._private import load_metrics, monitor
    from ray.autoscaler._private.autoscaler import AutoscalerSummary

    assert DEBUG_AUTOSCALING_STATUS
    text = source(monitor.Monitor._run)
    assert 'status["autoscaler_report"] = asdict(autoscaler_summary)' in text
    assert 'status["load_metrics_report"] = asdict(load_metrics_summary)' in text
    assert {"pending_nodes", "pending_launches", "node_availability_summary"} <= {*parameters(AutoscalerSummary)}
    assert {"resource_demand", "pg_demand"} <= {*parameters(load_metrics.LoadMetricsSummary)}


def test_autoscaler_v2_reports_what_it_launches_and_what_is_wanted() -> None:
    from ray.autoscaler.v2 import schema, sdk

    assert parameters(sdk.get_cluster_status) == ["gcs_address", "timeout"]
    names = {*parameters(schema.ClusterStatus)}
    assert {"pending_launches", "pending_nodes", "failed_launches", "resource_demands"} <= names
    assert {"ray_node_type_name", "count", "details"} <= {*parameters(schema.LaunchRequest)}
    assert {"ray_task_actor_demand", "placement_group_demand"} <= {*parameters(schema.ResourceDemandSummary)}
    assert parameters(schema.ResourceRequestByCount)[:2] == ["bundle", "count"]


def test_what_ray_says_of_lost_nodes_goes_through_print_to_stdstream_alone() -> None:
    from ray._private import worker

    assert parameters(worker.print_to_stdstream) == ["data", "ignore_prefix"]
    assert 'print_to_stdstream( { "lines": [error_message],' in source(worker.listen_error_messages)


def test_an_actor_that_asks_for_the_heads_resource_starts_on_the_head_of_a_plain_cluster() -> None:
    import ray

    from cpt_ray.cluster import HEAD, ON_HEAD

    @ray.remote(num_cpus=0, resources=ON_HEAD)
    class OnHead:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        heads = [node["NodeID"] for node in ray.nodes() if HEAD in node["Resources"]]
        assert [ray.get(OnHead.remote().node.remote(), timeout=120)] == heads
    finally:
        ray.shutdown()
