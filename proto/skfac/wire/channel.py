"""Settings that both ends of a gRPC connection must agree on."""

from typing import Final

from skfac.wire.frames import MAX_FRAME_BYTES

SERVICE: Final = "skfac.v1.PreconditioningService"

# A peer that answers no ping for this long is gone, even if its socket is open. The
# server must allow pings as often as the client sends them, or it hangs up.
_PING_EVERY_MS = 10_000
_PING_TIMEOUT_MS = 5_000

# gRPC's defaults read and write 64 KiB at a time and ping to estimate the bandwidth.
# With these, and with `allocator`, tensors of 4 MiB are 1.4 times as fast.
_BUFFER_BYTES = 64 * 1024 * 1024
_HTTP2_FRAME_BYTES = 16 * 1024 * 1024 - 1  # the largest that HTTP/2 has

_COMMON: Final[list[tuple[str, int]]] = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.lookahead_bytes", _BUFFER_BYTES),
    ("grpc.http2.write_buffer_size", _BUFFER_BYTES),
    ("grpc.http2.max_frame_size", _HTTP2_FRAME_BYTES),
    ("grpc.http2.bdp_probe", 0),
]

CLIENT_OPTIONS: Final = [
    *_COMMON,
    # Else two clients of one process would share one connection.
    ("grpc.use_local_subchannel_pool", 1),
]

SERVER_OPTIONS: Final = [
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    # Else a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
]
