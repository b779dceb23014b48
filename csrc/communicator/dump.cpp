// The file that a rank writes when its group ends by an error: what it did last, and how far its peers have come.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "communicator/group.h"
#include "core/clock.h"

namespace hxcomm {

std::string Group::dump(const std::string& why) const {
  std::call_once(dumped_, [&] {
    std::string safe_name = config_.name;
    for (char& c : safe_name)
      if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '-' && c != '_') c = '_';
    char suffix[64];
    std::snprintf(suffix, sizeof(suffix), "-%08x-rank%d.json", static_cast<unsigned>(config_.nonce & 0xFFFFFFFFu),
                  config_.rank);
    const std::string path = config_.dump_folder + "/hxcomm-" + safe_name.substr(0, 100) + suffix;
    std::string peers;
    for (int r = 0; r < config_.world_size; ++r) {
      const uint64_t progress = control(r).line.reached();
      const bool member = control(r).line.is_member(config_.nonce);
      const auto& peer = peers_[static_cast<size_t>(r)];
      peers += std::string(r > 0 ? ",\n  " : "") + "{\"rank\": " + std::to_string(r) +
               ", \"label\": " + json_text(config_.labels[static_cast<size_t>(r)]) +
               ", \"sequence\": " + std::to_string(progress >> kRoundBits) + ", \"state\": \"" +
               (peer && peer->dead.load() ? "dead"
                : member                  ? "member"
                                          : "left") +
               "\"}";
    }
    std::ofstream file(path);
    file << "{\"group\": " << json_text(config_.name) << ", \"rank\": " << config_.rank
         << ", \"world_size\": " << config_.world_size << ", \"now_ns\": " << now_ns()
         << ",\n\"error\": " << json_text(why) << ",\n\"ranks\": [\n  " << peers
         << "],\n\"operations\": " << flight_json(own().flight) << "}\n";
    file.close();
    dump_note_ = file ? " What this rank did last is in " + path + "."
                      : " (HXCOMM_DUMP: cannot write " + path + ": " + std::strerror(errno) + ")";
  });
  return dump_note_;
}

}  // namespace hxcomm
