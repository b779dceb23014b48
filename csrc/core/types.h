// Element types and reduce operations: their codes, names and sizes.
//
// A new dtype is one enumerator and one row of kDTypeTable here, and its arithmetic: one Lane in reduce_scalar.cpp and
// one in reduce_avx2.cpp. Without them it does not compile, and reduce_test.cpp sweeps the table. A new reduce
// operation is one enumerator, one name and one line of has_meaning() here, one line of combine() in reduce_kernels.h
// and its function in the Lanes. Append both: the codes travel in descriptors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hxcomm {

enum class DType : uint8_t {
  float32,
  float64,
  bfloat16,
  float16,
  int32,
  int64,
  uint8,
  boolean,
  int8,
  int16,
  complex64,
  complex128
};

enum class DTypeKind : uint8_t { floating, complex, integer, boolean };

struct DTypeInfo {
  DType dtype;
  const char* name;          // as torch and numpy say it
  size_t item_size;          // bytes
  size_t accumulation_size;  // bytes of the type it is reduced in: float32 for the 16-bit floats, else itself
  DTypeKind kind;
};

inline constexpr DTypeInfo kDTypeTable[] = {
    {DType::float32, "float32", 4, 4, DTypeKind::floating},
    {DType::float64, "float64", 8, 8, DTypeKind::floating},
    {DType::bfloat16, "bfloat16", 2, 4, DTypeKind::floating},
    {DType::float16, "float16", 2, 4, DTypeKind::floating},
    {DType::int32, "int32", 4, 4, DTypeKind::integer},
    {DType::int64, "int64", 8, 8, DTypeKind::integer},
    {DType::uint8, "uint8", 1, 1, DTypeKind::integer},
    {DType::boolean, "bool", 1, 1, DTypeKind::boolean},
    {DType::int8, "int8", 1, 1, DTypeKind::integer},
    {DType::int16, "int16", 2, 2, DTypeKind::integer},
    {DType::complex64, "complex64", 8, 8, DTypeKind::complex},
    {DType::complex128, "complex128", 16, 16, DTypeKind::complex},
};
inline constexpr int kDTypes = static_cast<int>(sizeof kDTypeTable / sizeof *kDTypeTable);

// Only for a valid dtype: a code that came from a peer or a user is compared with kDTypes first.
constexpr const DTypeInfo& info(DType dtype) { return kDTypeTable[static_cast<size_t>(dtype)]; }
constexpr size_t item_size(DType dtype) { return info(dtype).item_size; }
constexpr size_t accumulation_size(DType dtype) { return info(dtype).accumulation_size; }
constexpr DTypeKind kind_of(DType dtype) { return info(dtype).kind; }
constexpr bool is_floating(DType dtype) { return kind_of(dtype) == DTypeKind::floating; }
constexpr const char* dtype_name(DType dtype) { return info(dtype).name; }

constexpr bool dtype_table_is_in_order() {
  for (int i = 0; i < kDTypes; ++i)
    if (kDTypeTable[i].dtype != static_cast<DType>(i)) return false;
  return true;
}
static_assert(dtype_table_is_in_order());

enum class ReduceOp : uint8_t { sum, product, min, max, avg, band, bor, bxor, premul_sum };

inline constexpr const char* kReduceOpNames[] = {"sum",  "product", "min",  "max",       "avg",
                                                 "band", "bor",     "bxor", "premul_sum"};
inline constexpr int kReduceOps = static_cast<int>(sizeof kReduceOpNames / sizeof *kReduceOpNames);

constexpr const char* reduce_op_name(ReduceOp op) { return kReduceOpNames[static_cast<size_t>(op)]; }

// Which pairs the kernels carry out; unsupported() in reduce.h says why they do not carry out the others.
constexpr bool has_meaning(DType dtype, ReduceOp op) {
  const DTypeKind kind = kind_of(dtype);
  switch (op) {
    case ReduceOp::min:
    case ReduceOp::max:
      return kind != DTypeKind::complex;
    case ReduceOp::avg:
      return kind != DTypeKind::boolean;
    case ReduceOp::band:
    case ReduceOp::bor:
    case ReduceOp::bxor:
      return kind == DTypeKind::integer || kind == DTypeKind::boolean;
    case ReduceOp::premul_sum:
      return kind == DTypeKind::floating || kind == DTypeKind::complex;
    default:
      return true;
  }
}

// Where the blocks of a call lie: `hx` memory is in the rank's own segment, so that peers reach it; `cpu` is anywhere.
enum class DeviceKind : uint8_t { cpu = 0, hx = 1 };
constexpr int kDeviceKinds = 2;
inline const char* device_name(DeviceKind device) { return device == DeviceKind::hx ? "hx" : "cpu"; }

}  // namespace hxcomm
