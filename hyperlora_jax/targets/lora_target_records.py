"""How one subject lies in a record: the TFDS features, and the same bytes without decoding.

Records are tf.train.Example messages as TFDS writes and reads them. `parse` reads a record
directly, so that a LoRA vector costs one buffer copy and no picture is decoded in vain.
"""

from collections.abc import Mapping

import numpy as np

from hyperlora_jax.pictures.subjects import Subject

LORA_DTYPES = ("float32", "bfloat16")


def features(num_parameters: int, lora_dtype: str, embedding_sizes: Mapping[str, int]):
    """The TFDS features of a LoRA-target dataset.

    Opening needs nothing but tensorflow-datasets and array_record: pictures stay PNG bytes (TFDS'
    own picture feature would ask for OpenCV or Pillow), bfloat16 is stored as the uint16 of its
    bits.
    """
    import tensorflow_datasets as tfds

    def numbers(shape, dtype):
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    def png():
        return tfds.features.Scalar(np.object_, doc="bytes of a PNG file")

    entry = {
        "id": tfds.features.Text(),
        "identity": tfds.features.Text(),
        "references": tfds.features.Sequence(png()),
        "targets": tfds.features.Sequence({"image": png(), "caption": tfds.features.Text()}),
        "seed": np.int64,
        "num_steps": np.int64,
        "loss_curve": numbers((None,), np.float32),
    }
    if num_parameters:
        stored = {"float32": np.float32, "bfloat16": np.uint16}[lora_dtype]
        entry["lora"] = numbers((num_parameters,), stored)
    if embedding_sizes:
        entry["embeddings"] = {
            encoder: numbers((None, size), np.float32) for encoder, size in embedding_sizes.items()
        }
    return tfds.features.FeaturesDict(entry)


def serialize(subject: Subject, lora_dtype: str) -> bytes:
    """The record of a subject, equal to what TFDS' own serializer would write."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.features.feature

    def put(name: str, *values: bytes) -> None:
        feature[name].bytes_list.value.extend(values)

    put("id", subject.id.encode())
    put("identity", subject.identity.encode())
    put("references", *subject.references)
    put("targets/image", *subject.targets)
    put("targets/caption", *(caption.encode() for caption in subject.captions))
    put("loss_curve", np.asarray(subject.loss_curve, np.float32).tobytes())
    feature["seed"].int64_list.value.append(subject.seed)
    feature["num_steps"].int64_list.value.append(subject.num_steps)
    if subject.lora is not None:
        put("lora", encode_vector(subject.lora, lora_dtype))
    for encoder, rows in subject.embeddings.items():
        put(f"embeddings/{encoder}", np.ascontiguousarray(rows, np.float32).tobytes())
    return example.SerializeToString()


def parse(
    record: bytes, lora_dtype: str, embedding_sizes: Mapping[str, int], split: str = ""
) -> Subject:
    """The subject of a record."""
    feature = _features_of(record)
    encoded = {name: tuple(value.bytes_list.value) for name, value in feature.items()}
    embeddings = {
        encoder: np.frombuffer(encoded[f"embeddings/{encoder}"][0], np.float32).reshape(-1, size)
        for encoder, size in embedding_sizes.items()
    }
    return Subject(
        id=encoded["id"][0].decode(),
        identity=encoded["identity"][0].decode(),
        references=encoded.get("references", ()),
        targets=encoded.get("targets/image", ()),
        captions=tuple(caption.decode() for caption in encoded.get("targets/caption", ())),
        lora=decode_vector(encoded["lora"][0], lora_dtype) if "lora" in encoded else None,
        embeddings=embeddings,
        seed=feature["seed"].int64_list.value[0],
        num_steps=feature["num_steps"].int64_list.value[0],
        loss_curve=np.frombuffer(encoded["loss_curve"][0], np.float32),
        split=split,
    )


def parse_vector(record: bytes, lora_dtype: str) -> np.ndarray:
    """Only the LoRA vector of a record, float32 [d]; a view of the record where it is float32.

    Raises KeyError when the record has none, IndexError or ValueError when it is damaged.
    """
    start, stop = find_vector(record)
    return decode_vector(memoryview(record)[start:stop], lora_dtype)


def find_vector(record: bytes, name: bytes = b"lora") -> tuple[int, int]:
    """Where the bytes of the vector (or another feature) lie. Walks the message without decoding.

    Example = {1: Features}, Features = {1: entry}*, entry = {1: name, 2: Feature},
    Feature = {1: BytesList}, BytesList = {1: bytes}; every field is (tag, length, content).
    """
    _, position, end = _field(record, 0)
    while position < end:
        _, entry, next_entry = _field(record, position)
        _, key, key_end = _field(record, entry)
        if record[key:key_end] == name:
            _, feature, _ = _field(record, key_end)
            tag, values, _ = _field(record, feature)
            if tag == 1:
                return _field(record, values)[1:]
        position = next_entry
    raise KeyError(name.decode())


def _field(record: bytes, position: int) -> tuple[int, int, int]:
    """(field number, start, end) of the length-delimited field at a position."""
    tag = record[position]
    if tag & 7 != 2:
        raise ValueError(f"wire type {tag & 7} at byte {position}, expected 2")
    length = shift = 0
    while True:
        position += 1
        byte = record[position]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if position + 1 + length > len(record):
        raise ValueError(f"field of {length} bytes at byte {position} of {len(record)}")
    return tag >> 3, position + 1, position + 1 + length


def _features_of(record: bytes):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    return example.FromString(record).features.feature


def encode_vector(vector: np.ndarray, lora_dtype: str) -> bytes:
    """Bytes of a float32 vector; bfloat16 rounds to nearest, ties to even."""
    vector = np.ascontiguousarray(vector, np.float32)
    if lora_dtype == "float32":
        return vector.tobytes()
    bits = vector.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def parse_bfloat16(record: bytes, lora_dtype: str) -> np.ndarray:
    """Only the LoRA vector, as bfloat16 [d]: half the bytes to send to a device."""
    import ml_dtypes

    if lora_dtype == "float32":
        return parse_vector(record, lora_dtype).astype(ml_dtypes.bfloat16)
    start, stop = find_vector(record)
    return np.frombuffer(memoryview(record)[start:stop], ml_dtypes.bfloat16)


def decode_vector(encoded: bytes | memoryview, lora_dtype: str) -> np.ndarray:
    """Inverse of `encode_vector`, as float32 [d]."""
    if lora_dtype == "float32":
        return np.frombuffer(encoded, np.float32)
    return (np.frombuffer(encoded, np.uint16).astype(np.uint32) << 16).view(np.float32)
