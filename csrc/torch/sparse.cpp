// all_reduce of sparse tensors (COO): every rank gets all indices and values, and adds them up.
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include "torch/errors.h"
#include "torch/event.h"
#include "torch/process_group.h"
#include "torch/work.h"

namespace hxcomm::torch_glue {
namespace {

// What ranks tell each other first: dtype, sparse and dense dimensions, extents (0 beyond the last), elements.
constexpr int64_t kMaxDims = 16;
constexpr int64_t kElements = 3 + kMaxDims;
constexpr int64_t kHeader = kElements + 1;

at::Tensor header_of(const at::Tensor& tensor) {
  at::Tensor header = at::empty({kHeader}, at::kLong).zero_();
  auto* words = header.mutable_data_ptr<int64_t>();
  words[0] = static_cast<int64_t>(tensor.scalar_type());
  words[1] = tensor.sparse_dim();
  words[2] = tensor.dense_dim();
  for (int64_t d = 0; d < tensor.dim(); ++d) words[3 + d] = tensor.size(d);
  words[kElements] = tensor._nnz();
  return header;
}

std::string described(const int64_t* header) {
  std::string text = std::string(c10::toString(static_cast<at::ScalarType>(header[0]))) + " of [";
  for (int64_t d = 0; d < header[1] + header[2]; ++d) text += (d == 0 ? "" : ", ") + std::to_string(header[3 + d]);
  return text + "], " + std::to_string(header[1]) + " of its dimensions sparse";
}

void require_equal(const int64_t* headers, int ranks) {
  for (int r = 1; r < ranks; ++r)
    if (const int64_t* other = headers + r * kHeader; !std::equal(headers, headers + kElements, other))
      throw_typed(ErrorKind::mismatch, "all_reduce of sparse tensors that differ: rank 0 has " + described(headers) +
                                           "; rank " + std::to_string(r) + " has " + described(other) +
                                           ". No tensor was changed and the group stays usable.");
}

// The indices or values of all ranks: whole[r] is as long as rank r says.
struct Gathered {
  std::vector<at::Tensor> whole;
  Tensors call{kAllToAll, "all_reduce_sparse"};

  Gathered(const at::Tensor& own, int64_t varying_dim, const int64_t* headers, int ranks) {
    call.add_input_for_each(own, ranks);
    for (int r = 0; r < ranks; ++r) {
      auto sizes = own.sizes().vec();
      sizes[static_cast<size_t>(varying_dim)] = headers[r * kHeader + kElements];
      whole.push_back(at::empty(sizes, own.options()));
      call.add_output(whole.back());
    }
    call.set_uneven();
  }
};

// In rank order; 16-bit values are added in float32 and rounded once, as everywhere.
void store_sum(const at::Tensor& to, const std::vector<at::Tensor>& indices, const std::vector<at::Tensor>& values) {
  const at::ScalarType type = to.scalar_type();
  const bool narrow = type == at::kHalf || type == at::kBFloat16;
  const at::Tensor all = at::cat(values, 0);
  const at::Tensor sum =
      at::_sparse_coo_tensor_unsafe(at::cat(indices, 1), narrow ? all.to(at::kFloat) : all, to.sizes()).coalesce();
  at::Tensor result = at::_sparse_coo_tensor_unsafe(sum._indices(), sum._values().to(type), to.sizes());
  to.copy_(result._coalesced_(true));
}

}  // namespace

ProcessGroup::WorkPtr ProcessGroup::allreduce_sparse(List& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor tensor = tensors.size() == 1 ? tensors[0] : at::Tensor();
  Event event = begin_event("all_reduce_sparse", [&] { return std::vector<c10::IValue>{tensor}; });
  const c10::NoGradGuard no_grad;
  const auto timeout = options.timeout == c10d::kUnsetTimeout ? timeout_ : options.timeout;
  Tensors sizes(kAllGather, "all_reduce_sparse");
  const int n = getSize();
  const at::Tensor headers = at::empty({n, kHeader}, at::kLong);
  if (!tensor.defined() || !tensor.is_sparse())
    sizes.fail("takes one sparse tensor (COO) per process");
  else if (!tensor.device().is_cpu())
    sizes.fail("a tensor is on " + tensor.device().str() + "; this group serves cpu tensors");
  else if (options.reduceOp != c10d::ReduceOp::SUM)
    sizes.fail("sparse tensors can only be summed (ReduceOp.SUM)");
  else if (!dtype_of(tensor.scalar_type()))
    sizes.fail(std::string("dtype ") + c10::toString(tensor.scalar_type()) + " is not supported");
  else if (tensor.dim() > kMaxDims)
    sizes.fail("a sparse tensor of more than " + std::to_string(kMaxDims) + " dimensions");
  else
    sizes.add_input(header_of(tensor));
  sizes.add_output(headers, n);
  sizes.require_count(kHeader);
  issuer_.refuse_problems(sizes, timeout);
  const ApiCall exchange = sizes.call(timeout);
  if (const int kind = issuer_.api().run(issuer_.group(), &exchange); kind != 0) {
    std::string message = issuer_.api().message();
    if (kind == static_cast<int>(ErrorKind::mismatch))
      message += " (An all_reduce of a sparse tensor begins with an all_gather of its sizes.)";
    throw_typed(kind, message);
  }
  const auto* words = headers.const_data_ptr<int64_t>();
  require_equal(words, n);

  Gathered indices(tensor._indices(), 1, words, n);
  Gathered values(tensor._values(), 0, words, n);
  std::vector<Tensors> calls;
  calls.push_back(std::move(indices.call));
  calls.push_back(std::move(values.call));
  auto work = c10::make_intrusive<Work>(getRank(), c10d::OpType::_ALLREDUCE_SPARSE, &issuer_.api(), issuer_.group(),
                                        /*timed=*/nullptr, std::move(calls));
  work->set_finish({tensor},
                   [tensor, i = std::move(indices.whole), v = std::move(values.whole)] { store_sum(tensor, i, v); });
  work->set_event(std::move(event));
  work->post(timeout);
  if (!options.asyncOp) work->wait(kNoTimeout);
  return noted(std::move(work));
}

}  // namespace hxcomm::torch_glue
