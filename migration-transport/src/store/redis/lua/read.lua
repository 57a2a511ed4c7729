-- Reads a few pages of a block. Answers with the trailer and value of each, empty for no page.
--
-- Keys: block. Arguments: bytes of a slot, pages of a block, bytes of a trailer; then a byte for each
-- page, its place in the block. The block's form is in blocks.rs.
local slot_bytes, block_pages, trailer_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local directory_bytes = block_pages * 8
local directory = redis.call('GETRANGE', KEYS[1], 0, directory_bytes - 1)
local answer = {}
for k = 1, #ARGV[4] do
  answer[k] = ''
  local at = string.byte(ARGV[4], k) * 8 + 1
  if at + 7 <= #directory then
    local _, length, slot, used = struct.unpack('<I4I2BB', directory, at)
    if used == 1 then
      local first = directory_bytes + slot * slot_bytes
      answer[k] = redis.call('GETRANGE', KEYS[1], first, first + trailer_bytes + length - 1)
    end
  end
end
return answer
