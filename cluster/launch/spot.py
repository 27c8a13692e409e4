"""AWS machines for Ray's autoscaler: spot while there are any, on demand otherwise.

Ray asks for a spot machine again and again where AWS has none left, and never tries another type. aws.yaml names this
provider instead of Ray's own; it runs where ``ray up`` does and on the head.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

NO_SPOT = {"InsufficientInstanceCapacity", "MaxSpotInstanceCountExceeded", "SpotMaxPriceTooLow"}
"""What AWS answers where it has no spot machine for us, now or at our price."""


class SpotThenOnDemand(AWSNodeProvider):  # type: ignore[misc]
    """Ray's provider of AWS machines, which takes a machine on demand where a spot machine is refused."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start up to ``count`` machines; their instances by id.

        ``node_config`` is what EC2's ``RunInstances`` takes. Raises ``NodeLaunchException`` where AWS refuses.
        """
        try:
            return self._started(node_config, tags, count)
        except NodeLaunchException as refused:
            if "InstanceMarketOptions" not in node_config or refused.category not in NO_SPOT:
                raise
        on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
        return self._started(on_demand, tags, count)

    def _started(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        machines: dict[str, Any] = super().create_node(node_config, tags, count)
        return machines
