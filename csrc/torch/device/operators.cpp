// The operators that a decode step uses, without boxing; and those that make or relabel tensors, which are hx's own.
#include <ATen/EmptyTensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_copy_from_native.h>
#include <ATen/ops/_fused_sdp_choice_ops.h>
#include <ATen/ops/_index_put_impl_ops.h>
#include <ATen/ops/_local_scalar_dense_ops.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_ops.h>
#include <ATen/ops/_softmax_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/argmax_ops.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/cat_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/embedding_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/fill_ops.h>
#include <ATen/ops/gather_ops.h>
#include <ATen/ops/gelu_ops.h>
#include <ATen/ops/index_copy_ops.h>
#include <ATen/ops/index_ops.h>
#include <ATen/ops/index_select_ops.h>
#include <ATen/ops/mean_ops.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/silu_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/sum_ops.h>
#include <ATen/ops/topk_ops.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/where_ops.h>
#include <ATen/ops/zero_ops.h>

#include "torch/device/fast.h"
#include "torch/device/memory.h"

namespace hxcomm::device {
namespace {

// Makes `chip` current, as new storage comes from there.
class OnChip {
 public:
  explicit OnChip(std::optional<c10::Device> device)
      : before_(exchange_current_chip(device.has_value() && device->has_index() ? device->index() : current_chip())) {
    check_not_forked();
  }
  ~OnChip() { set_current_chip(before_); }
  OnChip(const OnChip&) = delete;
  OnChip& operator=(const OnChip&) = delete;

 private:
  int before_;
};

constexpr c10::DispatchKeySet kHxKeys(c10::DispatchKey::PrivateUse1);

void check_layout(std::optional<at::Layout> layout, std::optional<bool> pinned) {
  TORCH_CHECK_NOT_IMPLEMENTED(layout.value_or(at::kStrided) == at::kStrided, "tensors of layout ", *layout,
                              " are not supported on hx");
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  check_layout(layout, pinned);
  const OnChip on(device);
  return at::Tensor(at::detail::empty_generic(size, chip_allocator(), kHxKeys, c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device> device,
                         std::optional<bool> pinned) {
  check_layout(layout, pinned);
  const OnChip on(device);
  return at::Tensor(
      at::detail::empty_strided_generic(size, stride, chip_allocator(), kHxKeys, c10::dtype_or_default(dtype)));
}

// torch's own, which look only at sizes and at the storage's allocator: that one must ask for the right chip.
const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const OnChip on(self.device());
  return at::native::resize_(self, size, format);
}

at::Tensor& set_storage_(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                         at::IntArrayRef stride) {
  const OnChip on(source.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_source_storage_(at::Tensor& self, at::Storage source) {
  const OnChip on(source.device());
  return at::native::set_(self, std::move(source));
}

at::Tensor& set_empty_(at::Tensor& self) {
  const OnChip on(self.device());
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, chip_allocator(), /*resizable=*/true);
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {0}, {});
}

// Between hx and CPU, and between chips, too.
at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  return Fast<at::_ops::copy_>::run(self, source, non_blocking);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  copy_(target, self, non_blocking);
  return to;
}

// Every operation is finished when its call returns: no stream still uses a tensor.
void record_stream(at::Tensor&, c10::Stream) {}

// torch has no CPU kernel for products with another result dtype; kernels that are written for accelerators use them.
at::Tensor mm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return at::mm(a.to(dtype), b.to(dtype));
}
at::Tensor bmm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return at::bmm(a.to(dtype), b.to(dtype));
}
at::Tensor addmm_dtype(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                       const at::Scalar& beta, const at::Scalar& alpha) {
  return at::addmm(self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
}
at::Tensor baddbmm_dtype(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                         const at::Scalar& beta, const at::Scalar& alpha) {
  return at::baddbmm(self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
}

// Which attention runs: what CPU would choose for the same tensors. Without this hx would take the slow way, with other
// bits.
int64_t attention_choice(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const std::optional<at::Tensor>& mask, double dropout, bool causal,
                         std::optional<double> scale, bool grouped) {
  if (mask.has_value() && mask->requires_grad()) return static_cast<int64_t>(at::SDPBackend::math);
  return Fast<at::_ops::_fused_sdp_choice>::run(query, key, value, mask, dropout, causal, scale, grouped);
}

void register_own(torch::Library& m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage_);
  m.impl("set_.source_Storage", &set_source_storage_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_", &set_empty_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("record_stream", &record_stream);
  m.impl("mm.dtype", &mm_dtype);
  m.impl("bmm.dtype", &bmm_dtype);
  m.impl("addmm.dtype", &addmm_dtype);
  m.impl("baddbmm.dtype", &baddbmm_dtype);
}

}  // namespace

void start_operators() {
  namespace ops = at::_ops;
  static torch::Library m(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  register_own(m);
  register_fast<ops::_local_scalar_dense, ops::_fused_sdp_choice, ops::clone, ops::fill__Scalar, ops::zero_>(m);
  register_fast<ops::mm, ops::addmm, ops::bmm, ops::_scaled_dot_product_flash_attention_for_cpu>(m);
  register_fast<ops::add_Tensor, ops::add__Tensor, ops::sub_Tensor, ops::sub__Tensor, ops::mul_Tensor, ops::mul__Tensor,
                ops::div_Tensor, ops::div__Tensor>(m);
  register_fast<ops::neg, ops::exp, ops::sin, ops::cos, ops::rsqrt, ops::sigmoid, ops::silu, ops::silu_, ops::gelu,
                ops::pow_Tensor_Scalar>(m);
  register_fast<ops::_softmax, ops::mean_dim, ops::sum_dim_IntList, ops::argmax, ops::topk>(m);
  register_fast<ops::embedding, ops::index_select, ops::index_Tensor, ops::_index_put_impl_, ops::index_copy_,
                ops::gather, ops::cat, ops::where_self>(m);
  at::native::_fused_sdp_choice_stub.set_privateuse1_dispatch_ptr(&attention_choice);
}

}  // namespace hxcomm::device
