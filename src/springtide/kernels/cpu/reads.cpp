// What the rows of a pass read: which of them read the same pages, and so are computed together.

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "kernels.h"

namespace springtide {

Reads::Reads(std::vector<Request> given) : requests(std::move(given)) {
  std::int64_t most = 0;
  for (const Request& request : requests)
    for (std::int64_t page : request.table) pages = std::max(pages, page + 1);
  std::vector<std::int64_t> starts, firsts, lasts;  // of each request: its first row, and the spans that it reads
  for (const Request& own : requests) {
    starts.push_back(rows.size());
    std::int64_t low = own.length, high = 0;
    for (std::int64_t i = 0; i < own.rows; i++) {
      Row row{own.table.data(), own.length, 0, own.length, own.prefix, nullptr};
      if (!own.low.empty()) row.low = std::max<std::int64_t>(0, own.low[i]);
      if (own.tail.empty())
        row.high = std::min(own.length, own.prefix + i + 1);
      else  // the tail alone says which of the later slots are seen
        row.tail = own.tail.data() + i * (own.length - own.prefix), row.low = std::min(row.low, own.prefix);
      rows.push_back(row);
      low = std::min(low, row.low), high = std::max(high, row.high);
    }
    firsts.push_back(low / kSpan);
    lasts.push_back((high + kSpan - 1) / kSpan);
    most = std::max(most, lasts.back());
  }
  places.resize(rows.size());
  // Requests that agree in a span; they go on as one group while they are the same.
  std::map<std::vector<std::int32_t>, std::int32_t> before;
  for (std::int64_t span = 0; span < most; span++) {
    std::map<std::vector<std::int64_t>, std::vector<std::int32_t>> agreeing;
    for (std::size_t r = 0; r < requests.size(); r++) {
      if (span < firsts[r] || span >= lasts[r]) continue;
      const auto& table = requests[r].table;
      const std::int64_t from = span * kSpan / kPage;
      const std::int64_t to = std::min((span + 1) * kSpan, requests[r].length + kPage - 1) / kPage;
      agreeing[{table.begin() + from, table.begin() + to}].push_back(r);
    }
    std::map<std::vector<std::int32_t>, std::int32_t> now;
    for (auto& [key, own] : agreeing) {
      const auto same = before.find(own);
      if (same != before.end()) {
        groups[same->second].last++;
        now[own] = same->second;
        continue;
      }
      Group group{{}, requests[own[0]].table.data(), span, span + 1, 0};
      const auto number = static_cast<std::int32_t>(groups.size());
      for (std::int32_t r : own)
        for (std::int64_t row = starts[r]; row < starts[r] + requests[r].rows; row++) {
          if (!places[row].empty())
            group.depth = std::max(group.depth, groups[places[row].back().group].depth + 1);
          places[row].push_back({number, static_cast<std::int32_t>(group.rows.size())});
          group.rows.push_back(row);
        }
      depths = std::max<std::int64_t>(depths, group.depth + 1);
      groups.push_back(std::move(group));
      now[own] = number;
    }
    before = std::move(now);
  }
}

}  // namespace springtide
