#include "torch/tensors.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <numeric>

namespace hxcomm::torch_glue {
namespace {

struct DTypeRow {
  at::ScalarType type;
  int code;
};
// The order of core/types.h. A new dtype of the core gets its row here.
constexpr DTypeRow kDTypes[] = {
    {at::ScalarType::Float, 0}, {at::ScalarType::Double, 1}, {at::ScalarType::BFloat16, 2}, {at::ScalarType::Half, 3},
    {at::ScalarType::Int, 4},   {at::ScalarType::Long, 5},   {at::ScalarType::Byte, 6},     {at::ScalarType::Bool, 7},
};

}  // namespace

int dtype_code(at::ScalarType type) {
  for (const DTypeRow& row : kDTypes)
    if (row.type == type) return row.code;
  return -1;
}

int reduce_op_code(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return 0;
    case c10d::ReduceOp::PRODUCT:
      return 1;
    case c10d::ReduceOp::MIN:
      return 2;
    case c10d::ReduceOp::MAX:
      return 3;
    case c10d::ReduceOp::AVG:
      return 4;
    default:
      return -1;
  }
}

void Tensors::set_root(int64_t root, int size) {
  if (root < 0 || root >= size)
    fail("root is " + std::to_string(root) + ", but the group has ranks 0 to " + std::to_string(size - 1));
  call_.root = static_cast<int32_t>(root);
}

void Tensors::set_reduce_op(const c10d::ReduceOp& op, const Api& api) {
  call_.reduce_op = reduce_op_code(op);
  if (call_.reduce_op < 0) {
    call_.reduce_op = 0;
    fail("hxcomm has no reduce op number " + std::to_string(static_cast<int>(op.op_)) +
         " of torch's ReduceOp; it has SUM, AVG, PRODUCT, MIN and MAX");
  } else if (has_dtype_ && problem_.empty()) {
    const char* reason = api.unsupported(call_.dtype, call_.reduce_op);
    if (reason != nullptr) fail(reason);
  }
}

void Tensors::check(const at::Tensor& tensor) {
  if (!tensor.defined()) return fail("a tensor is not defined");
  if (tensor.layout() != at::kStrided) return fail("a tensor is sparse; hxcomm takes dense (strided) tensors");
  if (!tensor.device().is_cpu())
    return fail("a tensor is on " + tensor.device().str() + "; this group serves cpu tensors");
  const int code = dtype_code(tensor.scalar_type());
  if (code < 0)
    return fail(std::string("dtype ") + c10::toString(tensor.scalar_type()) +
                " is not supported; hxcomm has float32, float64, bfloat16, float16, int32, int64, uint8 and bool");
  if (has_dtype_ && type_ != tensor.scalar_type())
    return fail(std::string("tensors of dtypes ") + c10::toString(type_) + " and " +
                c10::toString(tensor.scalar_type()) + " in one call");
  if (!has_dtype_) shape_ = tensor.sizes();
  has_dtype_ = true;
  type_ = tensor.scalar_type();
  call_.dtype = code;
}

at::Tensor Tensors::contiguous(const at::Tensor& tensor, bool read, bool written) {
  check(tensor);
  if (!problem_.empty()) return tensor;
  if (written) results_.push_back(tensor);
  if (tensor.is_contiguous()) {
    kept_.push_back(tensor);
    return tensor;
  }
  const at::Tensor own = read ? tensor.contiguous() : at::empty(tensor.sizes(), tensor.options());
  kept_.push_back(own);
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

ApiCall Tensors::call(std::chrono::milliseconds timeout) {
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

void Tensors::copy_back() {
  for (const auto& [theirs, ours] : copies_) theirs.copy_(ours);
}

}  // namespace hxcomm::torch_glue
