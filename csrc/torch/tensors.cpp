#include "torch/tensors.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>

namespace hxcomm::torch_glue {
namespace {

struct DTypeRow {
  at::ScalarType type;
  DType dtype;
};
constexpr DTypeRow kRows[] = {
    {at::ScalarType::Float, DType::float32},
    {at::ScalarType::Double, DType::float64},
    {at::ScalarType::BFloat16, DType::bfloat16},
    {at::ScalarType::Half, DType::float16},
    {at::ScalarType::Char, DType::int8},
    {at::ScalarType::Short, DType::int16},
    {at::ScalarType::Int, DType::int32},
    {at::ScalarType::Long, DType::int64},
    {at::ScalarType::Byte, DType::uint8},
    {at::ScalarType::Bool, DType::boolean},
    {at::ScalarType::ComplexFloat, DType::complex64},
    {at::ScalarType::ComplexDouble, DType::complex128},
};
static_assert(sizeof kRows / sizeof *kRows == kDTypes);

std::string known_dtypes() {
  std::string text;
  for (const DTypeRow& row : kRows) text += (text.empty() ? "" : ", ") + std::string(dtype_name(row.dtype));
  return text;
}

}  // namespace

std::optional<DType> dtype_of(at::ScalarType type) {
  for (const DTypeRow& row : kRows)
    if (row.type == type) return row.dtype;
  return std::nullopt;
}

std::optional<ReduceOp> reduce_op_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return ReduceOp::sum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::avg;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::product;
    case c10d::ReduceOp::MIN:
      return ReduceOp::min;
    case c10d::ReduceOp::MAX:
      return ReduceOp::max;
    case c10d::ReduceOp::BAND:
      return ReduceOp::band;
    case c10d::ReduceOp::BOR:
      return ReduceOp::bor;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::bxor;
    case c10d::ReduceOp::PREMUL_SUM:
      return ReduceOp::premul_sum;
    default:
      return std::nullopt;
  }
}

void Tensors::set_root(int64_t root, int size) {
  if (root < 0 || root >= size)
    fail("root is " + std::to_string(root) + ", but the group has ranks 0 to " + std::to_string(size - 1));
  call_.root = static_cast<int32_t>(root);
}

void Tensors::set_peer(int peer, int tag, int size) {
  if (peer < 0 || peer >= size)
    fail("the other rank is " + std::to_string(peer) + ", but the group has ranks 0 to " + std::to_string(size - 1));
  call_.root = peer;
  call_.tag = tag;
}

void Tensors::set_window(uint64_t id, int64_t offset) {
  if (offset < 0) fail("an offset of " + std::to_string(offset) + " elements");
  call_.window = id;
  call_.offset = static_cast<uint64_t>(offset);
}

void Tensors::set_reduce_op(const c10d::ReduceOp& op) {
  const std::optional<ReduceOp> known = reduce_op_of(op);
  if (!known)
    return fail("hxcomm has no reduce op number " + std::to_string(static_cast<int>(op.op_)) +
                " of torch's ReduceOp; it has SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR and PREMUL_SUM");
  call_.reduce_op = static_cast<int>(*known);
  if (*known == ReduceOp::premul_sum) set_factor(op);
}

void Tensors::set_factor(const c10d::ReduceOp& op) {
  const auto* given = dynamic_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
  if (given == nullptr)
    return fail("PREMUL_SUM has no factor; make the reduce op with torch.distributed._make_nccl_premul_sum(factor)");
  const at::Tensor& tensor = given->tensor_factor;
  if (!tensor.defined()) {
    call_.factor = given->double_factor;
    return;
  }
  if (tensor.is_complex()) return fail("the factor of PREMUL_SUM is complex; it takes a real one");
  call_.factor = tensor.item().toDouble();
}

void Tensors::check(const at::Tensor& tensor) {
  if (!tensor.defined()) return fail("a tensor is not defined");
  if (tensor.layout() != at::kStrided) return fail("a tensor is sparse; hxcomm takes dense (strided) tensors");
  const bool hx = tensor.device().is_privateuseone();
  if (!hx && !tensor.device().is_cpu())
    return fail("a tensor is on " + tensor.device().str() + "; this group serves cpu and hx tensors");
  if (has_dtype_ && hx != is_hx()) return fail("tensors of devices cpu and hx in one call");
  call_.device = static_cast<int>(hx ? DeviceKind::hx : DeviceKind::cpu);
  const std::optional<DType> dtype = dtype_of(tensor.scalar_type());
  if (!dtype)
    return fail(std::string("dtype ") + c10::toString(tensor.scalar_type()) + " is not supported; hxcomm has " +
                known_dtypes());
  if (has_dtype_ && type_ != tensor.scalar_type())
    return fail(std::string("tensors of dtypes ") + c10::toString(type_) + " and " +
                c10::toString(tensor.scalar_type()) + " in one call");
  if (!has_dtype_) shape_ = tensor.sizes();
  has_dtype_ = true;
  type_ = tensor.scalar_type();
  call_.dtype = static_cast<int>(*dtype);
}

at::Tensor Tensors::contiguous(const at::Tensor& tensor, bool read, bool written) {
  check(tensor);
  if (!problem_.empty()) return tensor;
  if (written) results_.push_back(tensor);
  // A conjugated (or negated) view has the bytes of what it is a view of.
  const bool as_stored = tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
  at::Tensor own = tensor;
  if (!as_stored) {
    const c10::NoGradGuard no_grad;
    own = at::empty(tensor.sizes(), tensor.options());
    if (read) own.copy_(tensor);
  }
  if (read) read_.push_back(own);
  if (as_stored) return own;
  if (written) copies_.emplace_back(tensor, own);
  return own;
}

void Tensors::add_blocks(Blocks& to, const at::Tensor& tensor, int blocks) {
  if (!problem_.empty()) return;
  if (tensor.numel() % blocks != 0)
    return fail("a tensor of " + std::to_string(tensor.numel()) + " elements cannot be shared equally by " +
                std::to_string(blocks) + " ranks");
  const auto count = static_cast<uint64_t>(tensor.numel() / blocks);
  auto* data = static_cast<std::byte*>(tensor.data_ptr());
  for (int i = 0; i < blocks; ++i) to.push_back({data + static_cast<size_t>(i) * count * tensor.element_size(), count});
}

void Tensors::add_rows(Blocks& to, const at::Tensor& tensor, const std::vector<int64_t>& rows) {
  if (!problem_.empty()) return;
  const int64_t available = tensor.dim() == 0 ? 1 : tensor.size(0);
  int64_t total = 0;
  for (const int64_t n : rows) {
    if (n < 0) return fail("a split size is " + std::to_string(n));
    total += n;
  }
  if (total != available)
    return fail("the split sizes add up to " + std::to_string(total) + ", but the tensor's first dimension is " +
                std::to_string(available));
  const auto row = static_cast<uint64_t>(available > 0 ? tensor.numel() / available : 0);
  auto* data = static_cast<std::byte*>(tensor.data_ptr());
  for (const int64_t n : rows) {
    const uint64_t count = static_cast<uint64_t>(n) * row;
    to.push_back({data, count});
    data += count * tensor.element_size();
  }
}

void Tensors::add_input(const at::Tensor& tensor, int blocks) {
  add_blocks(input_, contiguous(tensor, true, false), blocks);
}

void Tensors::add_output(const at::Tensor& tensor, int blocks) {
  add_blocks(output_, contiguous(tensor, false, true), blocks);
}

void Tensors::add_in_place(const at::Tensor& tensor, bool written) {
  const at::Tensor own = contiguous(tensor, true, written);
  add_blocks(input_, own, 1);
  add_blocks(output_, own, 1);
}

void Tensors::add_input_for_each(const at::Tensor& tensor, int ranks) {
  const at::Tensor own = contiguous(tensor, true, false);
  for (int i = 0; i < ranks; ++i) add_blocks(input_, own, 1);
}

void Tensors::add_input_rows(const at::Tensor& tensor, const std::vector<int64_t>& rows) {
  add_rows(input_, contiguous(tensor, true, false), rows);
}

void Tensors::add_output_rows(const at::Tensor& tensor, const std::vector<int64_t>& rows) {
  add_rows(output_, contiguous(tensor, false, true), rows);
}

void Tensors::require_count(int64_t count) {
  call_.count = static_cast<uint64_t>(count);
  for (const auto* blocks : {&input_, &output_})
    for (const ApiBlock& block : *blocks)
      if (block.count != call_.count)
        return fail("tensors of " + std::to_string(call_.count) + " and of " + std::to_string(block.count) +
                    " elements where all ranks' parts must be equal");
}

ApiCall Tensors::call(std::chrono::milliseconds timeout) const {
  ApiCall call = call_;
  call.input = input_.data();
  call.n_input = input_.size();
  call.output = output_.data();
  call.n_output = output_.size();
  call.shape = shape_.data();
  call.n_shape = shape_.size();
  call.timeout_ns = std::chrono::nanoseconds(timeout).count();
  return call;
}

void Tensors::keep_forever() const noexcept {
  for (const auto* tensors : {&read_, &results_})
    for (const at::Tensor& tensor : *tensors) c10::raw::intrusive_ptr::incref(tensor.unsafeGetTensorImpl());
  for (const auto& [theirs, ours] : copies_) c10::raw::intrusive_ptr::incref(ours.unsafeGetTensorImpl());
}

void Tensors::copy_back() {
  if (copies_.empty()) return;
  const c10::NoGradGuard no_grad;  // a leaf that requires a gradient is written as any other, also in the background
  for (const auto& [theirs, ours] : copies_) theirs.copy_(ours);
}

}  // namespace hxcomm::torch_glue
