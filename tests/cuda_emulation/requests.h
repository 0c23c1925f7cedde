// What a warp's accesses to memory cost, instruction by instruction: wavefronts of shared memory,
// where lanes that meet in one of the 32 banks wait for each other, and sectors of 32 bytes of
// global memory. Lanes run one after the other here, so what they do together is told by the place
// in the source, and by how often a lane has been there since its warp last was together.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <map>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

namespace emulator {

struct Request {  // of a lane
  const char* file;
  unsigned line, column;
  const char* p;
  unsigned bytes;
  bool shared, write, matrix;  // matrix: rows of ldmatrix, of which eight lanes' are a wavefront
};

struct Cost {
  int64_t requests = 0, units = 0, least = 0;  // units: wavefronts or sectors; the least possible
  void add(const Cost& other) {
    requests += other.requests, units += other.units, least += other.least;
  }
};

using Lanes = std::vector<Request>;

// Of one instruction. A wavefront moves 128 bytes at most, of neighbouring lanes; it is as many
// wavefronts as the fullest bank has words.
inline Cost wavefronts(const Lanes& lanes) {
  const unsigned bytes = lanes[0].bytes;
  const size_t together = bytes <= 4 ? 32 : 128 / bytes;
  Cost cost = {1};
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::vector<uintptr_t> words;
    for (size_t i = first; i < std::min(first + together, lanes.size()); i++)
      for (unsigned byte = 0; byte < bytes; byte += 4)
        words.push_back(((uintptr_t)lanes[i].p + byte) / 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int64_t banks[32] = {};
    for (const uintptr_t word : words) banks[word % 32]++;
    cost.units += *std::max_element(banks, banks + 32);
    cost.least++;
  }
  return cost;
}

inline Cost sectors(const Lanes& lanes) {
  constexpr uintptr_t kSector = 32;
  std::vector<uintptr_t> touched, bytes;
  for (const Request& lane : lanes)
    for (uintptr_t byte = (uintptr_t)lane.p; byte < (uintptr_t)lane.p + lane.bytes; byte++)
      bytes.push_back(byte), touched.push_back(byte / kSector);
  for (auto* list : {&touched, &bytes}) {
    std::sort(list->begin(), list->end());
    list->erase(std::unique(list->begin(), list->end()), list->end());
  }
  return {1, (int64_t)touched.size(), (int64_t)((bytes.size() + kSector - 1) / kSector)};
}

// Costs by kernel and by what was accessed.
class Requests {
 public:
  bool counted = false;

  void clear() { costs_.clear(), lanes_.clear(); }
  void add(int lane, const char* p, unsigned bytes, bool shared, bool write,
           const std::source_location& where, bool matrix = false) {
    if (!counted) return;
    if (lanes_.size() <= (size_t)lane) lanes_.resize(lane + 1);
    lanes_[lane].push_back(
        {where.file_name(), where.line(), where.column(), p, bytes, shared, write, matrix});
  }

  // Threads have come to a barrier: what their warps did together until there is added up.
  void flush(const std::string& kernel) {
    if (!counted) return;
    for (size_t warp = 0; warp * 32 < lanes_.size(); warp++) flush_warp(kernel, warp);
  }

  std::string text() const {  // lines of: kernel memory access requests units least
    std::string text;
    for (const auto& [key, cost] : costs_)
      text += key + " " + std::to_string(cost.requests) + " " + std::to_string(cost.units) + " " +
              std::to_string(cost.least) + "\n";
    return text;
  }

 private:
  void flush_warp(const std::string& kernel, size_t warp) {
    using Place = std::tuple<const char*, unsigned, unsigned, bool, unsigned, int>;
    std::map<Place, Lanes> instructions;
    for (size_t lane = warp * 32; lane < std::min(warp * 32 + 32, lanes_.size()); lane++) {
      std::map<Place, int> seen;
      for (const Request& r : lanes_[lane]) {
        const Place place = {r.file, r.line, r.column, r.write, r.bytes, 0};
        Place nth = place;
        std::get<5>(nth) = seen[place]++;
        instructions[nth].push_back(r);
      }
      lanes_[lane].clear();
    }
    for (const auto& [place, lanes] : instructions) {
      const bool shared = lanes[0].shared;
      const std::string what = lanes[0].matrix ? "ldmatrix" : lanes[0].write ? "store" : "load";
      costs_[kernel + (shared ? " shared " : " global ") + what].add(shared ? wavefronts(lanes)
                                                                            : sectors(lanes));
    }
  }

  std::vector<Lanes> lanes_;  // of the running block's threads
  std::map<std::string, Cost> costs_;
};

}  // namespace emulator
