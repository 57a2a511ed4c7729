-- Moves staged blocks into a namespace. For each page the generations are compared first.
--
-- Keys: store, space, blocks, used; then for each piece the staged block and the block.
-- Arguments: VM, generation, limit, overhead of a block, bytes of a slot, pages of a block; then for
-- each piece the number of its block, and three bytes for each page: its place in the block, and
-- the length of its value, the lower byte first.
--
-- The block's form is in blocks.rs. In each staged block the pages have the slots 0, 1, … in order.
-- A put is stored whole or not at all: the first pass changes nothing.
local generation, limit = tonumber(ARGV[2]), tonumber(ARGV[3])
local overhead, slot_bytes, block_pages = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local directory_bytes = block_pages * 8
local pieces = (#KEYS - 4) / 2

local function staged(i) return KEYS[3 + 2 * i] end
local function block(i) return KEYS[4 + 2 * i] end

-- Returns the entries of a block that make sense, and how many slots it has.
local function entries_of(key, directory)
  local entries, found = {}, 0
  if #directory < directory_bytes then return entries, 0, 0 end
  local slots = math.floor((redis.call('STRLEN', key) - directory_bytes) / slot_bytes)
  for index = 0, block_pages - 1 do
    local old, _, slot, used = struct.unpack('<I4I2BB', directory, index * 8 + 1)
    if used == 1 and slot < slots then
      entries[index] = { generation = old, slot = slot }
      found = found + 1
    end
  end
  return entries, found, slots
end

-- Returns what is to be done with a piece.
local function look(i)
  local pages = ARGV[6 + 2 * i]
  local count = #pages / 3
  local directory = redis.call('GETRANGE', block(i), 0, directory_bytes - 1)
  if directory == '' then
    return { whole = true, fresh = true, taken = string.rep('1', count), added = overhead + count * slot_bytes }
  end
  local entries, found, slots = entries_of(block(i), directory)
  local taken, replaced, appended = {}, 0, 0
  for k = 1, count do
    local entry = entries[string.byte(pages, 3 * k - 2)]
    taken[k] = '1'
    if not entry then
      appended = appended + 1
    elseif entry.generation > generation then
      taken[k] = '0'
    else
      replaced = replaced + 1
    end
  end
  local plan = { taken = table.concat(taken) }
  -- nothing of the old block stays
  plan.whole = replaced == found and replaced + appended == count
  if plan.whole then
    plan.added = (count - slots) * slot_bytes
  else
    plan.added = appended * slot_bytes
    plan.directory, plan.entries, plan.slots = directory, entries, slots
    plan.appended, plan.replaced = appended, replaced
  end
  return plan
end

-- Puts the pages of a piece into a block of which other pages stay.
local function merge(i, plan)
  if plan.appended + plan.replaced == 0 then return end
  local pages, at = ARGV[6 + 2 * i], directory_bytes
  local entries = {}
  for index = 0, block_pages - 1 do
    entries[index + 1] = string.sub(plan.directory, index * 8 + 1, index * 8 + 8)
    if not plan.entries[index] then entries[index + 1] = string.rep('\0', 8) end
  end
  local added = {}
  for k = 1, #pages / 3 do
    if string.sub(plan.taken, k, k) == '1' then
      local index, low, high = string.byte(pages, 3 * k - 2, 3 * k)
      local data = redis.call('GETRANGE', staged(i), at, at + slot_bytes - 1)
      local entry = plan.entries[index]
      local slot = entry and entry.slot or plan.slots + #added
      if entry then
        redis.call('SETRANGE', block(i), directory_bytes + slot * slot_bytes, data)
      else
        added[#added + 1] = data
      end
      entries[index + 1] = struct.pack('<I4BBBB', generation, low, high, slot, 1)
    end
    at = at + slot_bytes
  end
  local directory = table.concat(entries)
  if #added == 0 then
    redis.call('SETRANGE', block(i), 0, directory)
  else
    -- a value that is appended to would take up to twice its length
    local old = redis.call('GETRANGE', block(i), directory_bytes, directory_bytes + plan.slots * slot_bytes - 1)
    redis.call('SET', block(i), directory .. old .. table.concat(added))
  end
end

local function put()
  local record = redis.call('HGET', KEYS[2], 'record')
  if not record then return { 'absent' } end
  if string.sub(record, 1, 16) ~= ARGV[1] then return { 'vm' } end
  local store = redis.call('GET', KEYS[1])
  if not store then return { 'damaged' } end
  local plans, taken, added = {}, {}, 0
  for i = 1, pieces do
    plans[i] = look(i)
    taken[i] = plans[i].taken
    added = added + plans[i].added
  end
  local used = tonumber(redis.call('GET', KEYS[4]) or '0')
  if added > 0 and used + added > limit then
    return { 'room', string.format('%.0f', added), string.format('%.0f', math.max(limit - used, 0)) }
  end
  local fresh = {}
  for i = 1, pieces do
    if plans[i].whole then
      redis.call('RENAME', staged(i), block(i))
      if plans[i].fresh then fresh[#fresh + 1] = ARGV[5 + 2 * i] end
    else
      merge(i, plans[i])
    end
  end
  if #fresh > 0 then redis.call('SADD', KEYS[3], unpack(fresh)) end
  if added ~= 0 then
    redis.call('INCRBY', KEYS[4], string.format('%.0f', added))
    redis.call('HINCRBY', KEYS[2], 'bytes', string.format('%.0f', added))
  end
  return { 'ok', store, table.concat(taken) }
end

-- No staged block stays, whatever happens. This also is the first change, after which the server
-- refuses none for lack of memory.
redis.call('DEL', KEYS[1] .. ':none')
local done, answer = pcall(put)
for i = 1, pieces do redis.call('DEL', staged(i)) end
if not done then
  local why = type(answer) == 'table' and answer.err or tostring(answer)
  return redis.error_reply(why)
end
return answer
