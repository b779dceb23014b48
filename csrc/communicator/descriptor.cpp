#include "communicator/descriptor.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace hxcomm {
namespace {

constexpr const char* kOpNames[kOpCodes] = {"all_reduce", "broadcast", "reduce",     "all_gather", "reduce_scatter",
                                            "gather",     "scatter",   "all_to_all", "barrier",    "send",
                                            "recv",       "put",       "signal",     "wait_signal"};

uint64_t mix(uint64_t hash, uint64_t value) {
  // The multiply-xorshift round of splitmix64: every input bit reaches every output bit.
  hash = (hash ^ value) * 0xBF58476D1CE4E5B9ull;
  return hash ^ (hash >> 29);
}

template <size_t N>
std::string bounded(const char (&text)[N]) {
  return {text, strnlen(text, N)};
}

void put(char* to, size_t size, const std::string& text) {
  const size_t n = std::min(size - 1, text.size());
  std::memcpy(to, text.data(), n);
  to[n] = '\0';
}

std::string shape_text(const Descriptor& d) {
  std::string text = "[";
  for (int i = 0; i < std::min<int>(d.n_dims, Descriptor::kMaxDims); ++i)
    text += (i > 0 ? ", " : "") + std::to_string(d.shape[i]);
  return text + "]";
}

std::vector<std::string> row(const std::string& label, const Descriptor& d) {
  if (d.refused != 0) return {label, "refused: " + bounded(d.text), "", "", "", "", "", "", ""};
  const bool data = d.op != static_cast<uint8_t>(OpCode::barrier);
  return {label,
          d.op < kOpCodes ? kOpNames[d.op] : "?",
          data && d.dtype < kDTypes ? dtype_name(static_cast<DType>(d.dtype)) : "-",
          !data           ? "-"
          : d.uneven != 0 ? "uneven"
                          : std::to_string(d.count),
          data ? shape_text(d) : "-",
          reduces(static_cast<OpCode>(d.op)) && d.reduce_op < kReduceOps
              ? reduce_op_name(static_cast<ReduceOp>(d.reduce_op))
              : "-",
          d.root >= 0 ? std::to_string(d.root) : "-",
          data && d.device < kDeviceKinds ? device_name(static_cast<DeviceKind>(d.device)) : "-",
          bounded(d.algorithm)};
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows[0].size(), 0);
  for (const auto& r : rows)
    if (r[2] != "" || &r == &rows[0])  // a refusal's one long cell does not widen the columns
      for (size_t c = 0; c < r.size(); ++c) widths[c] = std::max(widths[c], r[c].size());
  std::string text;
  for (const auto& r : rows) {
    std::string line = " ";
    for (size_t c = 0; c < r.size(); ++c) {
      line += " " + r[c] + std::string(widths[c] > r[c].size() ? widths[c] - r[c].size() : 0, ' ');
      if (c + 1 < r.size() && !(r[2] == "" && c >= 1)) line += " |";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += "\n" + line;
  }
  return text;
}

}  // namespace

const char* op_name(OpCode op) { return kOpNames[static_cast<int>(op)]; }

void write_descriptor(Descriptor& d, const Op& op, int world_size, const std::byte* segment) {
  const Call& call = op.call;
  d.sequence = op.sequence;
  d.issue_ps = call.issue_ps;
  d.op = static_cast<uint8_t>(call.op);
  d.dtype = static_cast<uint8_t>(call.dtype);
  d.reduce_op = static_cast<uint8_t>(call.reduce_op);
  d.device = static_cast<uint8_t>(call.device);
  d.uneven = call.uneven ? 1 : 0;
  d.refused = op.refusal.empty() ? 0 : 1;
  d.root = call.root;
  d.count = call.count;
  d.n_dims = static_cast<uint8_t>(call.shape.n_dims);
  std::copy_n(call.shape.extents, call.shape.n_dims, d.shape);
  if (d.refused != 0) {
    put(d.text, sizeof(d.text), op.refusal);
    return;
  }
  // The name is the plan's; rewriting it every time would touch one more cache line per op.
  if (d.plan_hash != op.choice.plan->hash) put(d.algorithm, sizeof(d.algorithm), op.choice.plan->algorithm);
  d.plan_hash = op.choice.plan->hash;
  if (!call.uneven && !op.mapped()) return;
  const auto put_extents = [&](const Blocks& blocks, Extent* to) {
    const size_t n = std::min(blocks.size(), static_cast<size_t>(world_size));
    for (size_t i = 0; i < n; ++i)
      // An empty tensor may have no memory at all.
      to[i] = {op.mapped() && blocks[i].count > 0 ? static_cast<uint64_t>(blocks[i].data - segment) : 0,
               blocks[i].count};
    return static_cast<uint16_t>(n);
  };
  d.n_input = put_extents(call.input, inputs_at(d));
  d.n_output = put_extents(call.output, outputs_at(d, world_size));
}

uint64_t fingerprint(const Op& op, bool with_shape) {
  if (!op.refusal.empty()) return 0;  // no other call's: theirs have the lowest bit set
  const Call& call = op.call;
  // AVG divides and so differs from SUM even where it moves the same bytes; only reducing ops have a reduce op. The
  // factors of PREMUL_SUM may differ by rank.
  const uint64_t reduce_op = reduces(call.op) ? static_cast<uint64_t>(call.reduce_op) : 0;
  uint64_t hash = mix(op.choice.plan->hash, op.sequence);
  hash = mix(hash, (uint64_t{static_cast<uint8_t>(call.op)} << 56) |
                       (uint64_t{static_cast<uint8_t>(call.dtype)} << 48) | (reduce_op << 40) |
                       (uint64_t{static_cast<uint8_t>(call.device)} << 32) | static_cast<uint32_t>(call.root));
  hash = mix(hash, call.uneven ? ~uint64_t{0} : call.count);
  hash = mix(hash, op.choice.segment_bytes);
  if (with_shape)
    for (size_t i = 0; i < call.shape.n_dims; ++i) hash = mix(hash, static_cast<uint64_t>(call.shape.extents[i]) + 1);
  return hash | 1;
}

std::string mismatch_table(const Descriptors& descriptors, uint64_t sequence, const std::vector<std::string>& labels) {
  std::vector<std::vector<std::string>> rows{
      {"rank", "op", "dtype", "numel", "shape", "reduce op", "root", "device", "algorithm"}};
  bool refused = false;
  for (size_t r = 0; r < descriptors.size(); ++r) {
    const Descriptor copy = *descriptors[r];
    refused = refused || copy.refused != 0;
    rows.push_back(row(labels[r], copy));
  }
  const std::string what =
      refused ? "a rank refused its call, so no rank's was carried out" : "the ranks called different collectives";
  return what + "; nothing was sent and the group stays usable. Collective #" + std::to_string(sequence) +
         " of this group:" + table(rows) +
         "\nMake every rank issue the same collectives in the same order with the same dtype, count, reduce op, "
         "root and device.";
}

namespace {

// Every rank must share out its contribution in the same way.
std::string compare_parts(const Descriptors& descriptors, uint64_t sequence, const std::vector<std::string>& labels,
                          uint64_t* longest) {
  const size_t n = descriptors.size();
  const auto part = [&](size_t rank, size_t i) { return inputs_at(*descriptors[rank])[i].count; };
  for (size_t i = 0; i < n; ++i) {
    *longest = std::max(*longest, part(0, i));
    for (size_t rank = 1; rank < n; ++rank)
      if (part(rank, i) != part(0, i))
        return "the parts of reduce_scatter #" + std::to_string(sequence) + " differ between ranks: input " +
               std::to_string(i) + " has " + std::to_string(part(0, i)) + " elements on " + labels[0] + " and " +
               std::to_string(part(rank, i)) + " on " + labels[rank] +
               "; nothing was sent and the group stays usable. The lists of inputs must be alike on every rank.";
  }
  return "";
}

}  // namespace

std::string compare_uneven(const Descriptors& descriptors, uint64_t sequence, const std::vector<std::string>& labels,
                           uint64_t* longest) {
  *longest = 0;
  if (descriptors[0]->op == static_cast<uint8_t>(OpCode::reduce_scatter))
    return compare_parts(descriptors, sequence, labels, longest);
  const size_t n = descriptors.size();
  for (size_t from = 0; from < n; ++from)
    for (size_t to = 0; to < n; ++to) {
      const uint64_t sent = inputs_at(*descriptors[from])[to].count;
      const uint64_t expected = outputs_at(*descriptors[to], static_cast<int>(n))[from].count;
      *longest = std::max(*longest, sent);
      if (sent != expected)
        return "the split sizes of all_to_all #" + std::to_string(sequence) + " do not fit together: " + labels[from] +
               " sends " + std::to_string(sent) + " elements to " + labels[to] + ", which expects " +
               std::to_string(expected) +
               "; nothing was sent and the group stays usable. input_split_sizes[j] on rank i must equal "
               "output_split_sizes[i] on rank j; so must the sizes of the tensors where lists of them are given.";
    }
  return "";
}

}  // namespace hxcomm
